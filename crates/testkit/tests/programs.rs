//! The fakes as programs. That this test exists also makes cargo build them for the tests of other crates.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use drover_testkit::mock_responses::MockResponses;

#[test]
fn fakes_say_that_they_are_fakes() {
    let output = Command::new(env!("CARGO_BIN_EXE_fake-app-server")).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("a fake for tests, not codex"), "{output:?}");
    let output = Command::new(env!("CARGO_BIN_EXE_mock-responses")).arg("--help").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("A mock of"), "{output:?}");
}

#[test]
fn the_mock_says_where_it_listens() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mock-responses")).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let addr = line.trim().strip_prefix("MOCK RESPONSES READY ").unwrap().to_owned();
    std::net::TcpStream::connect(addr).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_mock_ends_with_its_owner() {
    let mock = MockResponses::start().unwrap();
    let addr = mock.addr();
    std::net::TcpStream::connect(addr).unwrap();
    drop(mock);
    std::net::TcpStream::connect(addr).unwrap_err();
}
