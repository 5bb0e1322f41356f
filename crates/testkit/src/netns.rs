//! A laboratory of network namespaces: hosts with an address each on one or several bridges, links that lose, delay or cut, and
//! counters on every interface.
//!
//! Everything lives in namespaces that this made, the bridges too: no interface, rule or route of the machine itself is
//! touched. It needs root and `ip`; loss needs `nft`, a wide-area link needs `python3` and `/dev/net/tun`. Names carry the pid and the
//! start time of the process that made them, so that a later laboratory clears away what a killed one left.

mod neighbours;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_service::process::{self, ProcessId};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use self::neighbours::Room;

const PREFIX: &str = "drover-lab";
const LINK: &str = include_str!("netns/link.py");

/// Why a laboratory cannot be had here; `Ok` when it can.
pub fn usable(tools: &[&str]) -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("network namespaces need root".to_owned());
    }
    for tool in ["ip"].iter().chain(tools) {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
        if !found {
            return Err(format!("{tool} is not installed"));
        }
    }
    Lab::new(&[0]).map(drop).map_err(|error| format!("no network namespace can be made: {error:#}"))
}

/// Several hosts and what connects them. Dropping it ends what runs in them and removes them.
pub struct Lab {
    name: String,
    hosts: Vec<Host>,
    link: Option<Link>,
    _room: Room,
}

/// One host: a network namespace with one interface.
#[derive(Debug, Clone)]
pub struct Host {
    namespace: String,
    switch: String,
    port: String,
    /// Its address.
    pub addr: Ipv4Addr,
    /// Which bridge it is on.
    pub side: usize,
}

/// Carries frames between two bridges of one namespace, as a [`Wan`] says. Dropping it ends it.
pub(crate) struct Link {
    child: Child,
    settings: Option<ChildStdin>,
}

impl Link {
    pub(crate) fn start(namespace: &str, bridges: [&str; 2]) -> anyhow::Result<Self> {
        if !fs::exists("/dev/net/tun")? {
            bail!("/dev/net/tun is missing: load the module tun");
        }
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace, "python3", "-c", LINK, "tap0", bridges[0], "tap1", bridges[1]])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start the link")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        let link = Self { settings: child.stdin.take(), child };
        ensure!(line.trim() == "ready", "the link did not start: {line:?}");
        Ok(link)
    }

    pub(crate) fn set(&mut self, wan: Wan) -> anyhow::Result<()> {
        self.order(&wan.line())
    }

    pub(crate) fn cut(&mut self) -> anyhow::Result<()> {
        self.order("cut")
    }

    fn order(&mut self, line: &str) -> anyhow::Result<()> {
        let settings = self.settings.as_mut().context("the link has ended")?;
        writeln!(settings, "{line}").context("the link has ended")
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        drop(self.settings.take());
        let _ = self.child.wait();
    }
}

impl Lab {
    /// Hosts on as many bridges as there are numbers, each number telling how many. All are in one network, 10.77.0.0/16; what is on
    /// different bridges reaches each other only through [`Lab::connect`].
    pub fn new(sizes: &[usize]) -> anyhow::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        clear_leftovers()?;
        let me = ProcessId::current();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{}-{count}", me.pid, me.start_time);
        let mut lab = Self { name, hosts: Vec::new(), link: None, _room: Room::make() };
        let switch = lab.switch();
        ip(&["netns", "add", &switch])?;
        for (side, size) in sizes.iter().enumerate() {
            let bridge = format!("br{side}");
            // Without the wait of the spanning tree, and without learning delays.
            ip(&["-n", &switch, "link", "add", &bridge, "type", "bridge", "forward_delay", "0"])?;
            ip(&["-n", &switch, "link", "set", &bridge, "up"])?;
            for index in 0..*size {
                lab.add_host(side, index)?;
            }
        }
        Ok(lab)
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn add_host(&mut self, side: usize, index: usize) -> anyhow::Result<()> {
        let (switch, number) = (self.switch(), self.hosts.len());
        let namespace = format!("{}-{number}", self.name);
        let addr = Ipv4Addr::new(10, 77, side as u8 + 1, index as u8 + 1);
        let host =
            Host { namespace: namespace.clone(), switch: switch.clone(), port: format!("p{number}"), addr, side };
        ip(&["netns", "add", &namespace])?;
        self.hosts.push(host);
        let port = format!("p{number}");
        ip(&["link", "add", "eth0", "netns", &namespace, "type", "veth", "peer", "name", &port, "netns", &switch])?;
        ip(&["-n", &switch, "link", "set", &port, "master", &format!("br{side}"), "up"])?;
        ip(&["-n", &namespace, "addr", "add", &format!("{addr}/16"), "dev", "eth0"])?;
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])
    }

    /// The hosts, bridge by bridge.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Joins the first two bridges by a wide-area link.
    pub fn connect(&mut self, wan: Wan) -> anyhow::Result<()> {
        if self.link.is_none() {
            self.link = Some(Link::start(&self.switch(), ["br0", "br1"])?);
        }
        self.link.as_mut().context("the bridges are not connected")?.set(wan)
    }

    /// Cuts the wide-area link; [`Lab::connect`] heals it.
    pub fn cut(&mut self) -> anyhow::Result<()> {
        self.link.as_mut().context("the bridges are not connected")?.cut()
    }
}

/// How a wide-area link is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Wan {
    /// In each direction.
    pub delay_ms: f64,
    /// More or less than that, at random.
    pub jitter_ms: f64,
    /// Frames lost.
    pub loss_percent: f64,
    /// 0 for no limit.
    pub kbit_per_s: f64,
}

impl Wan {
    fn line(self) -> String {
        format!("{} {} {} {}", self.delay_ms, self.jitter_ms, self.loss_percent, self.kbit_per_s)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.link = None;
        for host in &self.hosts {
            remove(&host.namespace);
        }
        remove(&self.switch());
    }
}

/// What an interface has carried since it was made, link headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames sent.
    pub tx_packets: u64,
}

impl Host {
    /// A host that somebody else made, and who removes it.
    pub(crate) fn existing(namespace: String, switch: String, port: String, addr: Ipv4Addr) -> Self {
        Self { namespace, switch, port, addr, side: 0 }
    }

    /// A command that will run on this host. Its pid is the program's own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Runs code on a thread of its own that sees this host's network. Sockets opened in it stay on this host.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let namespace = fs::File::open(format!("/run/netns/{}", self.namespace))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                anyhow::Ok(act())
            });
            thread.join().map_err(|_| anyhow::anyhow!("the thread on the host panicked"))?
        })
    }

    /// What its interface has carried.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        let text = self.within(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
        let numbers: Vec<u64> = line.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let at = |index: usize| numbers.get(index).copied().context("a counter is missing");
        Ok(Counters { rx_bytes: at(0)?, rx_packets: at(1)?, tx_bytes: at(8)?, tx_packets: at(9)? })
    }

    /// Loses this share of the UDP datagrams that come in; 0 ends it.
    pub fn lose_udp(&self, percent: u32) -> anyhow::Result<()> {
        let mut rules = "table inet lab\ndelete table inet lab\n".to_owned();
        if percent > 0 {
            let _ = writeln!(
                rules,
                "table inet lab {{ chain in {{ type filter hook input priority 0; \
                 meta l4proto udp numgen random mod 1000 < {} drop; }}; }}",
                percent * 10
            );
        }
        let mut child = self.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("no input")?.write_all(rules.as_bytes())?;
        ensure!(child.wait()?.success(), "nft refused the rules");
        Ok(())
    }

    /// Pulls its cable out, or puts it back.
    pub fn plugged(&self, plugged: bool) -> anyhow::Result<()> {
        ip(&["-n", &self.switch, "link", "set", &self.port, if plugged { "up" } else { "down" }])
    }

    /// Starts a program on this host and reads what it prints.
    pub fn spawn(&self, mut command: Command) -> anyhow::Result<Program> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("failed to start {command:?}"))?;
        let output = Arc::new(Output::default());
        let streams: [Option<Box<dyn io::Read + Send>>; 2] = [
            child.stdout.take().map(|stream| Box::new(stream) as _),
            child.stderr.take().map(|stream| Box::new(stream) as _),
        ];
        for stream in streams.into_iter().flatten() {
            let output = output.clone();
            // Ends with the program.
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines() {
                    let Ok(line) = line else { return };
                    output.push(line);
                }
            });
        }
        Ok(Program { child, output })
    }
}

/// A program that runs on a host. Dropping it kills it.
pub struct Program {
    child: Child,
    output: Arc<Output>,
}

#[derive(Default)]
struct Output {
    lines: Mutex<VecDeque<(Instant, String)>>,
    more: Condvar,
}

/// Lines of a program that are kept; older ones are dropped.
const LINES: usize = 20_000;

impl Output {
    fn push(&self, line: String) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES {
            lines.pop_front();
        }
        lines.push_back((Instant::now(), line));
        self.more.notify_all();
    }
}

impl Program {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed()).context("no pid")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Kills it with SIGKILL, and says when.
    pub fn kill(&mut self) -> anyhow::Result<Instant> {
        self.child.kill()?;
        let when = Instant::now();
        self.child.wait()?;
        Ok(when)
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// When it first printed a matching line at or after `since`; waits for one until `deadline`.
    pub fn printed(
        &self,
        since: Instant,
        deadline: Instant,
        matches: impl Fn(&str) -> bool,
    ) -> Option<(Instant, String)> {
        let mut lines = self.output.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = lines.iter().find(|(when, line)| *when >= since && matches(line)) {
                return Some(found.clone());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            lines = self.output.more.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How many matching lines it has printed since then.
    pub fn count(&self, since: Instant, matches: impl Fn(&str) -> bool) -> usize {
        let lines = self.output.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|(when, line)| *when >= since && matches(line)).count()
    }

    /// The last lines that it printed, for a message about what went wrong.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.output.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let from = lines.len().saturating_sub(count);
        lines.iter().skip(from).flat_map(|(_, line)| [line.as_str(), "\n"]).collect()
    }

    /// Resident memory in MiB.
    pub fn resident_mib(&self) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
        Ok(kib / 1024.0)
    }

    /// Processor time so far, in milliseconds, to the 10 ms that the kernel tells.
    pub fn processor_ms(&self) -> anyhow::Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // The name of the program may hold anything; times in its own and the kernel's code are fields 14 and 15.
        let (_, fields) = text.rsplit_once(") ").context("no fields")?;
        let ticks = fields.split(' ').skip(11).take(2).map(|field| Ok(field.parse::<f64>()?));
        Ok(ticks.sum::<anyhow::Result<f64>>()? * 10.0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stops processes for `stopped` and lets them run for `running`, in turn, until it is dropped; then all run.
pub struct StopCycle {
    over: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl StopCycle {
    /// Begins with stopping.
    pub fn start(pids: Vec<u32>, stopped: Duration, running: Duration) -> Self {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = over.clone();
        let thread = std::thread::spawn(move || {
            let all = |signal: Signal| {
                for pid in &pids {
                    let _ = Pid::from_raw(pid.cast_signed()).map(|pid| kill_process(pid, signal));
                }
            };
            let wait = |span: Duration| {
                let (over, changed) = &*shared;
                let over = over.lock().unwrap_or_else(PoisonError::into_inner);
                *changed.wait_timeout_while(over, span, |over| !*over).unwrap_or_else(PoisonError::into_inner).0
            };
            loop {
                all(Signal::STOP);
                let over = wait(stopped);
                all(Signal::CONT);
                if over || wait(running) {
                    return;
                }
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for StopCycle {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("failed to run ip")?;
    ensure!(
        output.status.success(),
        "ip {} failed: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Ends what runs in a namespace of ours, and removes it with its interfaces.
fn remove(namespace: &str) {
    if let Ok(pids) = Command::new("ip").args(["netns", "pids", namespace]).output() {
        for pid in String::from_utf8_lossy(&pids.stdout).lines().filter_map(|line| line.trim().parse().ok()) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
    let _ = ip(&["netns", "del", namespace]);
}

/// Removes the namespaces of laboratories whose process is gone.
fn clear_leftovers() -> anyhow::Result<()> {
    let dir = PathBuf::from("/run/netns");
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-')) else { continue };
        let mut words = rest.split('-').map(str::parse);
        if let (Some(Ok(pid)), Some(Ok(start_time))) = (words.next(), words.next())
            && !process::is_alive(&ProcessId { pid: pid as u32, start_time })
        {
            remove(&name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::{skip, this_test};

    /// Datagrams of 100 that arrive on the other host.
    fn sent(from: &Host, to: &Host) -> usize {
        let receiver = to.within(|| UdpSocket::bind((to.addr, 4000)).unwrap()).unwrap();
        receiver.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        let sender = from.within(|| UdpSocket::bind((from.addr, 0)).unwrap()).unwrap();
        for index in 0..100 {
            sender.send_to(&[index; 8], (to.addr, 4000)).unwrap();
        }
        std::iter::from_fn(|| receiver.recv(&mut [0; 16]).ok()).count()
    }

    #[test]
    fn a_laboratory_loses_delays_cuts_and_leaves_nothing() {
        if let Err(why) = usable(&["nft", "python3"]) {
            return skip(&this_test(), &why);
        }
        let mut lab = Lab::new(&[2, 1]).unwrap();
        let [a, b, c] = [0, 1, 2].map(|index| lab.hosts()[index].clone());
        assert_eq!(sent(&a, &b), 100);
        b.lose_udp(40).unwrap();
        assert!((30..90).contains(&sent(&a, &b)), "40 % are lost");
        b.lose_udp(0).unwrap();
        b.plugged(false).unwrap();
        assert_eq!(sent(&a, &b), 0, "its cable is out");
        b.plugged(true).unwrap();
        lab.connect(Wan { delay_ms: 50.0, ..Wan::default() }).unwrap();
        let before = c.counters().unwrap();
        assert_eq!(sent(&a, &c), 100);
        let after = c.counters().unwrap();
        assert!(after.rx_packets - before.rx_packets >= 100, "{before:?} {after:?}");
        lab.cut().unwrap();
        assert_eq!(sent(&a, &c), 0, "the link is cut");

        let sleeper = a.command("sleep").arg("600").spawn().map(|child| child.id()).unwrap();
        let name = lab.name.clone();
        drop(lab);
        assert!(!fs::exists(format!("/proc/{sleeper}/root")).unwrap_or(false) || zombie(sleeper), "it was killed");
        let left: Vec<_> = fs::read_dir("/run/netns").unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert!(left.iter().all(|entry| !entry.to_string_lossy().starts_with(&name)), "{left:?}");
    }

    fn zombie(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    }
}
