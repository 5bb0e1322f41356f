//! The laboratory itself: a real Slurm on this machine does what a cluster does, breaks as one breaks, and leaves nothing.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drover_testkit::lab::{Options, SlurmLab, USER, scripts, usable};
use drover_testkit::netns::Wan;
use drover_testkit::{skip, this_test};

/// Slurm decides in seconds; a busy machine takes longer.
const LIMIT: Duration = Duration::from_secs(90);

/// A laboratory, or a note why there is none.
fn lab(options: Options) -> Option<SlurmLab> {
    if let Err(why) = usable(&options) {
        skip(&this_test(), &why);
        return None;
    }
    Some(SlurmLab::start(options).unwrap())
}

/// Waits until a question has the answer that is looked for.
#[track_caller]
fn eventually<T: std::fmt::Debug>(lab: &SlurmLab, what: &str, ask: impl Fn() -> T, good: impl Fn(&T) -> bool) -> T {
    let began = Instant::now();
    loop {
        let answer = ask();
        if good(&answer) {
            return answer;
        }
        assert!(began.elapsed() < LIMIT, "{what}: still {answer:?} after {LIMIT:?}\n{}", lab.logs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Submits a script on the login host, and gives the job's id.
fn submit(lab: &SlurmLab, options: &[&str], script: &str) -> String {
    let mut argv = vec!["sbatch", "--parsable", "--time=10", "--output=%j.out"];
    argv.extend(options);
    argv.extend(["--wrap", script]);
    lab.run("login", &argv).unwrap()
}

/// A job's state as `scontrol` shows it; empty when Slurm knows no such job.
fn state(lab: &SlurmLab, job: &str) -> String {
    let shown = lab.run("login", &["scontrol", "-o", "show", "job", job]).unwrap_or_default();
    let word = shown.split_ascii_whitespace().find_map(|word| word.strip_prefix("JobState="));
    word.unwrap_or_default().to_owned()
}

/// What the shared directory has in this file of the user's home; empty when there is none.
fn shared(lab: &SlurmLab, file: &str) -> String {
    fs::read_to_string(lab.home().unwrap().join(file)).unwrap_or_default()
}

/// Every node's state as `sinfo` shows it.
fn node_states(lab: &SlurmLab) -> BTreeMap<String, String> {
    let shown = lab.run("login", &["sinfo", "-h", "-N", "-o", "%N %T"]).unwrap_or_default();
    shown.lines().filter_map(|line| line.split_once(' ')).map(|(node, state)| (node.into(), state.into())).collect()
}

/// Every process of every host, by host.
fn everything(lab: &SlurmLab) -> BTreeMap<String, Vec<(u32, String)>> {
    let hosts = lab.nodes().into_iter().chain(["ctl", "login", "switch"].map(str::to_owned));
    hosts.map(|host| (host.clone(), lab.processes(&host).unwrap())).collect()
}

/// Whether the laptop reaches a TCP port.
fn laptop_reaches(lab: &SlurmLab, to: impl Into<SocketAddr>) -> bool {
    let to = to.into();
    lab.laptop().within(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok()).unwrap()
}

#[test]
fn jobs_run_and_the_laptop_sees_ssh_and_nothing_else() {
    let Some(lab) = lab(Options::default()) else { return };

    // Up again: not a process more, not one less.
    let before = everything(&lab);
    lab.up().unwrap();
    eventually(&lab, "the processes", || everything(&lab), |now| *now == before);
    assert!(before["n1"].iter().any(|(_, argv)| argv == "slurmd -D -N n1"), "{before:?}");

    // One task on each of four hosts, with a name and a /tmp of its own, and one shared home.
    let script = "echo gpus $ROCR_VISIBLE_DEVICES; \
                  srun --ntasks-per-node=1 sh -c 'touch /tmp/mine; echo $(hostname) $(whoami) $(ls /tmp)'";
    let job = submit(&lab, &["--nodes=4", "--partition=mi2508x", "--signal=TERM@60"], script);
    eventually(&lab, "the job", || state(&lab, &job), |state| state == "COMPLETED");
    let output = shared(&lab, &format!("{job}.out"));
    let mut lines: Vec<&str> = output.lines().collect();
    lines.sort_unstable();
    let wanted: Vec<String> = lab.nodes().iter().map(|node| format!("{node} {USER} mine")).collect();
    assert_eq!((lines[0], lines[1..].join(" ")), ("gpus 0,1,2,3,4,5,6,7", wanted.join(" ")));

    // What is queued is listed, and what is cancelled ends.
    let job = submit(&lab, &["--nodes=2", "--job-name=long"], "srun sleep 600");
    let queue = || lab.run("login", &["squeue", "--me", "-h", "-o", "%i %j %T %D"]).unwrap();
    eventually(&lab, "the queue", queue, |queue| *queue == format!("{job} long RUNNING 2"));
    lab.run("login", &["scancel", &job]).unwrap();
    eventually(&lab, "the queue", queue, String::is_empty);
    assert_eq!(state(&lab, &job), "CANCELLED");

    // A requeued job keeps its id and counts.
    let job = submit(&lab, &["--requeue"], "echo run ${SLURM_RESTART_COUNT:-0}; sleep 600");
    let said = || shared(&lab, &format!("{job}.out"));
    eventually(&lab, "the first run", said, |said| said.contains("run 0"));
    lab.run("login", &["scontrol", "requeue", &job]).unwrap();
    eventually(&lab, "the second run", said, |said| said.contains("run 1"));
    lab.run("login", &["scancel", &job]).unwrap();

    // The laptop: SSH, and nothing else of anybody.
    let output = lab.ssh(&["hostname; whoami; squeue --version"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with(&format!("login\n{USER}\nslurm")), "{output:?}");
    let login = lab.login_addr();
    eventually(&lab, "the SSH server", || laptop_reaches(&lab, (login, 22)), |reached| *reached);
    let server = lab.network("login").within(|| TcpListener::bind("0.0.0.0:8000").unwrap()).unwrap();
    let inside = lab.network("login").addr;
    assert!(lab.network("n1").within(|| TcpStream::connect((inside, 8000)).is_ok()).unwrap(), "inside it is there");
    assert!(!laptop_reaches(&lab, (login, 8000)), "another port of the login host");
    // Even if the laptop knew a way to the cluster.
    let route = ["route", "add", "10.77.0.0/24", "via", &login.to_string()].map(str::to_owned);
    assert!(lab.laptop().command("ip").args(route).status().unwrap().success());
    for (host, port) in [("login", 8000), ("ctl", 6817), ("n1", 6818)] {
        assert!(!laptop_reaches(&lab, (lab.network(host).addr, port)), "{host} port {port}");
    }
    eventually(&lab, "the SSH server by its other address", || laptop_reaches(&lab, (inside, 22)), |reached| *reached);
    drop(server);

    // Connections are counted.
    assert_eq!(lab.ssh_connections().unwrap(), 0);
    let mut session = lab.ssh(&["echo here; cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(session.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!((line.as_str(), lab.ssh_connections().unwrap()), ("here\n", 1));
    let servers = |argv: &str| lab.processes("login").unwrap().iter().filter(|(_, ours)| ours == argv).count();
    assert_eq!(servers("cat"), 1);

    // A hang-up ends sessions, and the server takes new ones.
    // What it reads stays open: `wait` would close it, and then the session could end by itself.
    let input = session.stdin.take();
    lab.hang_up().unwrap();
    assert!(!session.wait().unwrap().success());
    drop(input);
    assert!(lab.ssh(&["true"]).status().unwrap().success());
    // Without a server there is nobody to talk to.
    lab.kill("login", "sshd").unwrap();
    assert!(!laptop_reaches(&lab, (login, 22)));
    lab.up().unwrap();
    assert!(lab.ssh(&["true"]).status().unwrap().success());
}

#[test]
fn hosts_daemons_and_links_fail_and_come_back() {
    let Some(lab) = lab(Options::default()) else { return };
    let beat = "while echo beat >> $(hostname).beats; do sleep 0.2; done";
    // A job that survives its host, one whose host is only cut off, and one whose slurmd dies.
    let killed = submit(&lab, &["--requeue", "--nodelist=n1", "--job-name=killed"], beat);
    let cut = submit(&lab, &["--no-requeue", "--nodelist=n2", "--job-name=cut-off"], beat);
    let orphan = submit(&lab, &["--no-requeue", "--nodelist=n3", "--job-name=orphan"], beat);
    let beats = |node: &str| shared(&lab, &format!("{node}.beats")).len();
    for node in ["n1", "n2", "n3"] {
        eventually(&lab, node, || beats(node), |beats| *beats > 0);
    }

    lab.crash("n1").unwrap();
    assert!(lab.processes("n1").is_err(), "it is off");
    let last = beats("n1");
    lab.cut("n2").unwrap();
    lab.kill("n3", "slurmd").unwrap();

    // While Slurm makes up its mind: a dead controller is asked in vain, and comes back with the jobs that it had saved.
    let unsaved = || {
        let saved = fs::read(lab.dir().join("hosts/ctl/slurmctld/job_state")).unwrap_or_default();
        let there = |name: &str| saved.windows(name.len()).any(|bytes| bytes == name.as_bytes());
        ["killed", "cut-off", "orphan"].into_iter().filter(|name| !there(name)).collect::<Vec<_>>()
    };
    eventually(&lab, "jobs are saved", unsaved, Vec::is_empty);
    lab.kill("ctl", "slurmctld").unwrap();
    let answer = || lab.run("login", &["scontrol", "ping"]).unwrap_or_else(|error| error.to_string());
    assert!(answer().contains("DOWN"), "{}", answer());
    lab.begin("ctl", "slurmctld").unwrap();
    eventually(&lab, "the controller", answer, |answer| answer.contains("UP"));

    let down = |states: &BTreeMap<String, String>| {
        ["n1", "n2", "n3"].iter().all(|node| states.get(*node).is_some_and(|state| state.starts_with("down")))
    };
    eventually(&lab, "three nodes are missed", || node_states(&lab), down);
    assert_eq!(beats("n1"), last, "what was killed writes no more");
    for (node, job) in [("n2", &cut), ("n3", &orphan)] {
        eventually(&lab, "the job of a node that is missed", || state(&lab, job), |state| state == "NODE_FAIL");
        let then = beats(node);
        eventually(&lab, "what Slurm calls failed goes on writing", || beats(node), |now| *now > then);
    }
    eventually(&lab, "the job of the dead host waits", || state(&lab, &killed), |state| state == "PENDING");

    lab.mend("n2").unwrap();
    lab.up().unwrap();
    let idle = |states: &BTreeMap<String, String>| {
        states.len() == 4 && states.values().all(|state| ["idle", "allocated"].contains(&state.as_str()))
    };
    eventually(&lab, "every node is back", || node_states(&lab), idle);
    eventually(&lab, "the job runs again", || state(&lab, &killed), |state| state == "RUNNING");
    eventually(&lab, "and writes", || beats("n1"), |now| *now > last);
    lab.run("login", &["scancel", "--user", USER]).unwrap();
}

/// Seconds that a command of the laptop took, and whether it did what it should.
fn timed(mut command: Command) -> (f64, bool) {
    let began = Instant::now();
    let done = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success();
    (began.elapsed().as_secs_f64(), done)
}

/// TCP segments that the login host has sent more than once.
fn sent_again(lab: &SlurmLab) -> u64 {
    let table = lab.network("login").within(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap()).unwrap();
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let mut pairs = names.split(' ').zip(values.split(' '));
    pairs.find(|(name, _)| *name == "RetransSegs").unwrap().1.parse().unwrap()
}

#[test]
fn the_way_to_the_login_host_is_slow_lossy_narrow_or_cut() {
    let Some(mut lab) = lab(Options { nodes: 1, ..Options::default() }) else { return };
    let login = SocketAddr::from((lab.login_addr(), 22));
    let round_trip = |lab: &SlurmLab| {
        let connect = || {
            let began = Instant::now();
            TcpStream::connect_timeout(&login, LIMIT).map(|_| began.elapsed())
        };
        let trips = (0..5).map(|_| lab.laptop().within(connect).unwrap().unwrap());
        trips.min().unwrap()
    };
    assert!(round_trip(&lab) < Duration::from_millis(90));

    // A session that is open all the while.
    let mut session = lab.ssh(&["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut typed, mut heard) =
        (session.stdin.take().unwrap(), BufReader::new(session.stdout.take().unwrap()).lines());
    let mut echo = |word: &str| {
        writeln!(typed, "{word}").unwrap();
        assert_eq!(heard.next().unwrap().unwrap(), word);
    };
    echo("before");

    lab.wan(Wan { delay_ms: 50.0, ..Wan::default() }).unwrap();
    let slow = round_trip(&lab);
    assert!((Duration::from_millis(100)..Duration::from_secs(3)).contains(&slow), "{slow:?}");
    echo("slow");

    // Of some seven hundred frames that carry a megabyte, one in twenty is lost and sent again.
    lab.wan(Wan { delay_ms: 5.0, loss_percent: 5.0, ..Wan::default() }).unwrap();
    let before = sent_again(&lab);
    let (_, done) = timed(lab.ssh(&["head -c 1000000 /dev/urandom"]));
    assert!(done);
    let again = sent_again(&lab) - before;
    assert!((8..300).contains(&again), "{again} were sent again");
    echo("lossy");

    // Cut off, a session stands still; then it goes on.
    lab.cut_wan().unwrap();
    let refused = lab.laptop().within(|| TcpStream::connect_timeout(&login, Duration::from_secs(1))).unwrap();
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    lab.mend_wan().unwrap();
    echo("mended");
    lab.wan(Wan::default()).unwrap();
    assert!(round_trip(&lab) < Duration::from_millis(90));
    lab.cut_wan().unwrap();
    let refused = lab.laptop().within(|| TcpStream::connect_timeout(&login, Duration::from_secs(1))).unwrap();
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    lab.mend_wan().unwrap();
    echo("whole");

    // 4 MB at 16 Mbit/s take two seconds, whatever the machine.
    lab.wan(Wan { kbit_per_s: 16_000.0, ..Wan::default() }).unwrap();
    let (seconds, done) = timed(lab.ssh(&["head -c 4000000 /dev/urandom"]));
    assert!(done && seconds > 1.6, "{seconds} s");
    drop(typed);
    assert!(session.wait().unwrap().success());
}

#[test]
fn hosts_cache_what_they_know_and_the_shared_directory_fills() {
    let options = Options { nodes: 2, cache_seconds: 3, quota_mib: 64, ..Options::default() };
    let Some(lab) = lab(options) else { return };
    let size = |node: &str| lab.run(node, &["stat", "-c", "%s", "file"]).unwrap();
    let append = |node: &str| lab.run(node, &["sh", "-c", "echo one more >> file"]).unwrap();
    // A host that has just looked does not see what another writes, and sees it later. On a machine so busy that looking
    // twice takes three seconds it would: then again.
    let stale = (0..20).any(|_| {
        append("n1");
        let known = size("n2");
        append("n1");
        let real = size("n1");
        let believed = size("n2");
        eventually(&lab, "the new size", || size("n2"), |size| *size == real);
        believed == known
    });
    assert!(stale, "no host was ever behind");

    // A name that was not there is not looked for again for a while.
    assert!(lab.run("n2", &["cat", "later"]).is_err());
    lab.run("n1", &["sh", "-c", "echo here > later"]).unwrap();
    eventually(&lab, "the name", || lab.run("n2", &["cat", "later"]).ok(), |text| text.as_deref() == Some("here"));

    lab.fill().unwrap();
    let error = lab.run("login", &["cp", "/etc/hosts", "full"]).unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    lab.free().unwrap();
    lab.run("login", &["cp", "/etc/hosts", "full"]).unwrap();
    // A job runs on all that.
    let job = submit(&lab, &["--nodes=2"], "srun hostname");
    let output = || shared(&lab, &format!("{job}.out")).lines().count();
    eventually(&lab, "the output", output, |lines| *lines == 2);
}

#[test]
fn accounting_tells_how_jobs_ended() {
    let Some(lab) = lab(Options { nodes: 1, sacct: true, ..Options::default() }) else { return };
    let good = submit(&lab, &["--job-name=good"], "srun true");
    let bad = submit(&lab, &["--job-name=bad"], "exit 3");
    for job in [&good, &bad] {
        eventually(
            &lab,
            "the job ends",
            || state(&lab, job),
            |state| ["COMPLETED", "FAILED"].contains(&state.as_str()),
        );
    }
    let jobs = format!("{good},{bad}");
    let told = || lab.run("login", &["sacct", "-nXP", "-j", &jobs, "-o", "jobname,state,exitcode,user"]).unwrap();
    let wanted = format!("good|COMPLETED|0:0|{USER}\nbad|FAILED|3:0|{USER}");
    eventually(&lab, "the history", told, |told| *told == wanted);
}

/// What a laboratory could leave behind: processes, network namespaces, mounts, files.
fn traces(name: &str, spaces: &[u64]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path();
        let Ok(space) = fs::metadata(path.join("ns/net")) else { continue };
        let argv = fs::read(path.join("cmdline")).unwrap_or_default();
        let argv = String::from_utf8_lossy(&argv).replace('\0', " ");
        if spaces.contains(&space.ino()) || argv.contains(&format!("drover-slurm-{name}")) {
            found.push(format!("{} {argv}", path.display()));
        }
    }
    for dir in ["/run/netns", "/var/tmp"] {
        let entries = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path().display().to_string());
        found.extend(entries.filter(|path| path.contains(&format!("drover-slurm-{name}"))));
    }
    for table in ["/proc/self/mountinfo", "/etc/passwd", "/etc/hosts", "/proc/net/dev"] {
        let text = fs::read_to_string(table).unwrap();
        let lines = text.lines().filter(|line| line.contains(&format!("drover-slurm-{name}")) || line.contains(USER));
        found.extend(lines.map(str::to_owned));
    }
    found
}

/// The network namespaces of a laboratory, by inode.
fn spaces(lab: &SlurmLab) -> Vec<u64> {
    let prefix = format!("drover-slurm-{}-", lab.name());
    let entries = fs::read_dir("/run/netns").unwrap().flatten();
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    ours.map(|entry| fs::metadata(entry.path()).unwrap().ino()).collect()
}

#[test]
fn two_at_once_do_not_meet_and_leave_nothing() {
    let options = Options { nodes: 1, partition: "one".to_owned(), ..Options::default() };
    let Some(one) = lab(options) else { return };
    let two = SlurmLab::start(Options { nodes: 2, partition: "two".to_owned(), ..Options::default() }).unwrap();
    assert_eq!((node_states(&one).len(), node_states(&two).len()), (1, 2));
    for lab in [&one, &two] {
        let job = submit(lab, &[], "hostname > who; sleep 600");
        assert_eq!(job, "1");
        eventually(lab, "the job", || shared(lab, "who"), |who| who == "n1\n");
    }
    one.run("login", &["scancel", "1"]).unwrap();
    eventually(&one, "the job", || state(&one, "1"), |state| state == "CANCELLED");
    assert_eq!(state(&two, "1"), "RUNNING");
    let options = one.run("login", &["sinfo", "-h", "-o", "%R"]).unwrap();
    assert_eq!(options, "one");

    let (name, left) = (one.name().to_owned(), spaces(&one));
    assert_eq!(left.len(), 5, "switch, laptop, ctl, login, n1");
    assert!(!traces(&name, &left).is_empty());
    drop(one);
    assert_eq!(traces(&name, &left), Vec::<String>::new());
    assert_eq!(state(&two, "1"), "RUNNING");

    // One whose owner is killed ends by itself.
    let mut owner = Command::new("sleep").arg("600").spawn().unwrap();
    let orphan = format!("{name}-orphan");
    let mut up = Command::new(scripts().join("up"));
    up.env("LAB", &orphan).args(["--nodes", "1", "--owner", &owner.id().to_string()]);
    assert!(up.status().unwrap().success());
    assert!(!traces(&orphan, &[]).is_empty());
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually(&two, "the orphan", || traces(&orphan, &[]), Vec::is_empty);

    let (name, left) = (two.name().to_owned(), spaces(&two));
    drop(two);
    assert_eq!(traces(&name, &left), Vec::<String>::new());
}
