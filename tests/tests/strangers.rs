//! A second user of the machine and everything of the first: what listens, what lies on disk, what runs. The same is tried as
//! the owner, who must be served, so that the test can fail. Needs root, to become somebody else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, ok};
use drover_e2e::sure::must;
use drover_testkit::cluster::{Cluster, processes_of};
use drover_testkit::{skip, this_test};

const STRANGER: u32 = 61_111;
const PATIENCE: Duration = Duration::from_secs(30);
/// States in the kernel's tables: a socket that takes connections, and an unconnected one of UDP.
const LISTENING: &str = "0A";
const UNCONNECTED: &str = "07";

/// What a shell of this user prints.
fn says(uid: u32, script: &str) -> String {
    let uid = uid.to_string();
    let mut program = Command::new("setpriv");
    program.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", "/bin/bash", "-c", script]);
    let output = program.current_dir("/").output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Every socket of these processes in a table of the kernel, as `address:port`.
fn sockets(pids: &[u32], table: &str, state: &str) -> BTreeSet<String> {
    let links = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten());
    let ours: BTreeSet<String> = links
        .filter_map(|fd| {
            fs::read_link(fd.path()).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned)
        })
        .collect();
    let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap();
    let of_ours = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (addr, port) = fields.get(1)?.split_once(':')?;
        let is_ours = *fields.get(3)? == state && ours.contains(*fields.get(9)?);
        let addr = u32::from_str_radix(addr, 16).ok()?.to_ne_bytes();
        let port = u16::from_str_radix(port, 16).ok()?;
        is_ours.then(|| format!("{}.{}.{}.{}:{port}", addr[0], addr[1], addr[2], addr[3]))
    };
    text.lines().skip(1).filter_map(of_ours).collect()
}

/// How many bytes a user gets who asks by HTTP, and how many by a line of the control plane.
fn answered(uid: u32, addr: &str) -> (usize, usize) {
    let (host, port) = addr.rsplit_once(':').unwrap();
    let host = if host == "0.0.0.0" { "127.0.0.1" } else { host };
    let ask = |question: &str| {
        let script = format!(
            "trap '' PIPE; exec 3<>/dev/tcp/{host}/{port} || exit; printf '%s' '{question}' | sed 's/~/\\r\\n/g' >&3 2>/dev/null; \
             timeout 10 head -c 40 <&3 | wc -c"
        );
        says(uid, &script).trim().parse().unwrap_or(0)
    };
    (
        ask("GET /healthz HTTP/1.0~~"),
        ask(r#"{"protocol":"codeswarm.router.v1","command":"swarm_list","request_id":"r"}~"#),
    )
}

/// Files that are open, but for those of the system.
fn open_files(pids: &[u32], below: &Path) -> BTreeSet<PathBuf> {
    let links = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten());
    links
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter(|path| path.starts_with(below) && path.exists())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_neither_connects_nor_reads_nor_signals() {
    if !rustix::process::geteuid().is_root() {
        return skip(&this_test(), "becoming another user needs root");
    }
    let cluster = must(Cluster::start("worker: {agent: echo}\n").await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--prompt", "hush", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    must(ok(&cluster, &["inject", &swarm, "--prompt", "nobody else's business"]));
    fs::write(cluster.dir().join("prompts.txt"), "one\n").unwrap();
    must(ok(&cluster, &["dispatch", "prompts.txt", "--provider", "sim"]));
    // What lies around the state directory is open to all, so that its own walls are what is tried.
    fs::set_permissions(cluster.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Two for the router, one for each other daemon, and three for each node: its worker, its membership, its sessions.
    let (pids, tcp) = loop {
        let pids = processes_of(cluster.state().path());
        let tcp = sockets(&pids, "tcp", LISTENING);
        if tcp.len() >= 11 {
            break (pids, tcp);
        }
        assert!(Instant::now() < deadline, "{tcp:?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(sockets(&pids, "tcp6", LISTENING).is_empty() && sockets(&pids, "udp6", UNCONNECTED).is_empty());
    for addr in &tcp {
        let (http, line) = answered(0, addr);
        assert!(http > 0 || line > 0, "{addr} does not even answer its owner");
        assert_eq!(answered(STRANGER, addr), (0, 0), "{addr} answers a stranger");
    }
    // The gossip tells a stranger in a word why it does not listen, and nothing of the nodes.
    let udp = sockets(&pids, "udp", UNCONNECTED);
    assert!(udp.len() >= 2, "{udp:?}");
    for addr in &udp {
        let (host, port) = addr.rsplit_once(':').unwrap();
        let script = format!(
            "exec 3<>/dev/udp/{host}/{port}; for i in 1 2 3; do printf 'hello, who is there?' >&3; done; timeout 1 cat <&3"
        );
        let told = says(STRANGER, &script);
        assert!(told.len() <= 60 && !told.contains(&swarm[..8]), "{addr} tells a stranger {told:?}");
    }

    let state = cluster.state().path();
    let find = |uid: u32, what: &str| says(uid, &format!("find {} {what} 2>/dev/null | wc -l", state.display()));
    let count = |text: String| text.trim().parse::<usize>().unwrap();
    assert!(count(find(0, "-type f")) > 20);
    // The name of the directory itself is no secret.
    assert_eq!(count(find(STRANGER, "-mindepth 1")), 0);
    let open = open_files(&pids, state);
    assert!(open.len() > 5, "{open:?}");
    let listed: Vec<String> = open.iter().map(|path| format!("'{}'", path.display())).collect();
    let readable = |uid: u32| {
        says(uid, &format!("for f in {}; do head -c 1 \"$f\" >/dev/null 2>&1 && echo yes; done", listed.join(" ")))
            .lines()
            .count()
    };
    assert_eq!((readable(0), readable(STRANGER)), (open.len(), 0));

    for pid in &pids {
        let may = |uid: u32, what: &str| !says(uid, &format!("{what} 2>/dev/null && echo yes")).is_empty();
        assert!(may(0, &format!("kill -0 {pid}")), "{pid} is gone");
        for what in ["kill -0", "kill -TERM", "kill -KILL"] {
            assert!(!may(STRANGER, &format!("{what} {pid}")), "a stranger may {what} {pid}");
        }
        for look in [
            "cat /proc/PID/environ",
            "cat /proc/PID/maps",
            "head -c 1 /proc/PID/mem",
            "ls /proc/PID/fd",
            "readlink /proc/PID/cwd",
        ] {
            let look = format!("{} >/dev/null", look.replace("PID", &pid.to_string()));
            assert!(!may(STRANGER, &look), "a stranger may {look}");
            // Its owner reads all but the memory at an address where there is none.
            assert!(look.contains("/mem") || may(0, &look), "its owner may not {look}");
        }
    }
    assert_eq!(processes_of(state).len(), pids.len(), "and all live");
    must(ok(&cluster, &["inject", "last", "--prompt", "still there"]));
}
