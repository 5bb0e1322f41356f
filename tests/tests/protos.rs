//! The protos keep the rules of their kind, and break no client of the last release.

use std::path::Path;
use std::process::Command;

use drover_testkit::codex::repository_root;
use drover_testkit::{skip, this_test};

#[test]
fn protos_are_linted_and_break_nobody() {
    let root = repository_root();
    let buf = root.join("target/buf/node_modules/@bufbuild/buf-linux-x64/bin/buf");
    if !buf.is_file() {
        skip(&this_test(), "buf is not installed: cargo xtask test installs it");
        return;
    }
    let check = |args: &[&str], dir: &Path| {
        let output = Command::new(&buf).args(args).current_dir(dir).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let proto = root.join("proto");
    assert_eq!(check(&["lint"], &proto), (true, String::new()));
    assert_eq!(check(&["breaking", "--against", "released.binpb"], &proto), (true, String::new()));

    // The checker itself is checked: a removed field and a bad name are found.
    let broken = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(&proto).arg(broken.path()).status().unwrap();
    assert!(copied.success());
    let file = broken.path().join("proto/drover/common/v1/common.proto");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("uint32 node_id = 2;", "uint32 nodeIndex = 2;")).unwrap();
    let dir = broken.path().join("proto");
    assert!(!check(&["lint"], &dir).0, "a camel-case field must be found");
    assert!(!check(&["breaking", "--against", "released.binpb"], &dir).0, "a renamed field must be found");
}
