//! `drover connect`: standard input and output as one connection.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener};
use std::process::{Command, Stdio};

fn drover(address: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_drover"));
    command.args(["connect", address]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn everything_is_carried_both_ways_and_ends_with_the_far_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let wanted = sent.clone();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // It speaks first, and answers once it has heard all.
        stream.write_all(b"hello").unwrap();
        let mut question = [0; 4];
        for _ in 0..3 {
            stream.read_exact(&mut question).unwrap();
            stream.write_all(&question).unwrap();
        }
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        assert!(heard == wanted, "{} bytes of {}", heard.len(), wanted.len());
        stream.write_all(&heard).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let mut child = drover(&address).spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut greeting = [0; 5];
    output.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"hello");
    // Nothing is held back until there is more: this would hang.
    let mut answer = [0; 4];
    for question in [b"one?", b"two?", b"3rd?"] {
        input.write_all(question).unwrap();
        output.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, question);
    }
    let sending = std::thread::spawn(move || {
        input.write_all(&sent).unwrap();
        sent
    });
    let mut back = Vec::new();
    output.read_to_end(&mut back).unwrap();
    assert!(back == sending.join().unwrap());
    assert!(child.wait().unwrap().success());
    server.join().unwrap();
}

#[test]
fn it_ends_with_the_far_end_though_its_input_stays_open() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut child = drover(&listener.local_addr().unwrap().to_string()).spawn().unwrap();
    drop(listener.accept().unwrap());
    assert!(child.wait().unwrap().success());
}

#[test]
fn nobody_there_is_told_by_message_and_exit_code() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let output = drover(&address).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains(&format!("cannot connect to {address}")), "{said}");
    let help = Command::new(env!("CARGO_BIN_EXE_drover")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(!help.contains("connect standard input") && !help.contains("  site "), "these are not for people: {help}");
}
