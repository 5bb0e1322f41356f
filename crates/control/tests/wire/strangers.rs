//! Connections of another user of the machine. Needs root, to become somebody else.

use std::process::{Command, Stdio};

use drover_config::SecurityConfig;

use crate::fake::{Knobs, Plane};

const STRANGER: u32 = 65534;

/// The first line that a process of that user reads after it has asked for the list: empty when it is refused.
async fn ask_as(uid: u32, plane: &Plane) -> String {
    let port = plane.addr.port();
    let asking = move || {
        // Only programs that every user may run; a refused write must not end the script before it reads.
        let script = format!(
            r#"trap '' PIPE; exec 3<>/dev/tcp/127.0.0.1/{port} || exit 7
            echo '{{"protocol":"codeswarm.router.v1","command":"swarm_list","request_id":"r"}}' >&3 2>/dev/null
            read -r -t 10 line <&3; echo "[$line]""#
        );
        let mut program = Command::new("setpriv");
        program.args(["--reuid", &uid.to_string(), "--clear-groups", "--", "/bin/bash", "-c", &script]);
        program.current_dir("/").stdin(Stdio::null()).output().unwrap()
    };
    let output = tokio::task::spawn_blocking(asking).await.unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{output:?}");
    printed.trim_matches(['[', ']']).to_owned()
}

#[tokio::test]
async fn another_user_is_refused_unless_allowed() {
    let root = std::fs::metadata("/proc/self").is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0);
    if !root {
        assert!(std::env::var_os("CI").is_none(), "becoming another user needs root");
        return;
    }
    let plane = Plane::start(Knobs::default());
    assert_eq!(ask_as(STRANGER, &plane).await, "", "a stranger was served");
    assert!(ask_as(0, &plane).await.contains("\"swarm_list\""));

    let security = SecurityConfig { allow_uids: vec![STRANGER], ..SecurityConfig::default() };
    let plane = Plane::start_with(Knobs::default(), 1 << 20, 1 << 20, &security);
    assert!(ask_as(STRANGER, &plane).await.contains("\"swarm_list\""));
}
