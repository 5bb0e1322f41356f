//! What is done to a cluster, its hosts and the way to them while a swarm works.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use drover_testkit::cluster::signal;
use drover_testkit::netns::Wan;
use rustix::process::Signal;
use serde_json::Value;

use super::{Seat, Site};

/// One thing that goes wrong, and is put right again where a site would do that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    /// Every SSH connection is closed by the login host
    SshCut,
    /// The way to the login host loses everything, in silence
    SshFrozen,
    /// Nobody listens on the login host's SSH port, and open connections are closed
    SshRefused,
    /// 100 ms of delay and 5 % loss on the way to the login host
    Slow,
    /// The SSH server is killed and started again
    SshdRestart,
    /// The follower is killed, three times
    Follower,
    /// The router is killed, three times
    Router,
    /// The allocator is killed, three times
    Allocator,
    /// The laptop loses its power and its network, and comes back
    LaptopGone,
    /// Slurm's controller is killed, and started again later
    Slurmctld,
    /// The slurmd of a node is killed, and started again when Slurm has given the node up
    Slurmd,
    /// A host of the job loses its power, and comes back
    Host,
    /// A host of the job is cut off from the network, and comes back
    Link,
    /// The job is put back into the queue
    Requeue,
    /// Somebody cancels the job
    Scancel,
    /// The job's time is up
    Walltime,
    /// The shared file system is full for a while
    Quota,
}

/// What a fault may do to prompts and to the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Harm {
    /// Nobody who works is touched: every prompt is carried out, by the workers of before.
    None,
    /// Workers die, and the job starts others: a turn that was under way is lost, and said to be.
    Workers,
    /// The job ends in one of these states; what it had not done fails, and is said to.
    Job(&'static [&'static str]),
}

impl Fault {
    /// Whether it is about the way from the laptop to the login host.
    pub fn needs_laptop(self) -> bool {
        matches!(
            self,
            Self::SshCut | Self::SshFrozen | Self::SshRefused | Self::Slow | Self::SshdRestart | Self::LaptopGone
        )
    }

    pub(crate) fn harm(self) -> Harm {
        match self {
            Self::Slurmd | Self::Host | Self::Link | Self::Requeue => Harm::Workers,
            Self::Scancel => Harm::Job(&["CANCELLED"]),
            // Workers that are told a minute before may be gone in order by then.
            Self::Walltime => Harm::Job(&["TIMEOUT", "COMPLETED"]),
            _ => Harm::None,
        }
    }

    /// Time limit of a job that is to meet it.
    pub(crate) fn time(self) -> &'static str {
        if self == Self::Walltime { "00:02:00" } else { "00:30:00" }
    }

    /// About how long it takes, when what lasts lasts this long.
    pub(crate) fn lasts(self, long: Duration) -> Duration {
        match self {
            Self::SshCut | Self::SshdRestart | Self::Scancel => Duration::from_secs(2),
            Self::Follower | Self::Router | Self::Allocator => Duration::from_secs(9),
            Self::LaptopGone => long * 2,
            Self::Requeue => Duration::from_secs(15),
            Self::Walltime => Duration::from_mins(2),
            Self::Slurmd => long.max(Duration::from_secs(40)),
            _ => long,
        }
    }

    /// Does it, and puts right what it broke.
    pub(crate) async fn strike(self, site: &mut Site, swarm: &str, long: Duration) -> anyhow::Result<()> {
        let status = site.status(swarm)?;
        let job = status["job_id"].as_str().context("the swarm has no job")?.to_owned();
        let last = status["nodes"].as_array().and_then(|nodes| nodes.last()).map_or(&Value::Null, |node| &node["host"]);
        let host = last.as_str().filter(|host| !host.is_empty()).context("the last node has no host")?.to_owned();
        let lasts = self.lasts(long);
        match self {
            Self::SshCut => site.lab.hang_up()?,
            Self::SshFrozen => {
                site.lab.cut_wan()?;
                tokio::time::sleep(lasts).await;
                site.lab.mend_wan()?;
            }
            Self::SshRefused => {
                site.lab.kill("login", "sshd")?;
                site.lab.hang_up()?;
                tokio::time::sleep(lasts).await;
                site.lab.begin("login", "sshd")?;
            }
            Self::Slow => {
                site.lab.wan(Wan { delay_ms: 100.0, loss_percent: 5.0, ..Wan::default() })?;
                tokio::time::sleep(lasts).await;
                site.lab.wan(Wan::default())?;
            }
            Self::SshdRestart => {
                site.lab.kill("login", "sshd")?;
                site.lab.hang_up()?;
                site.lab.begin("login", "sshd")?;
            }
            Self::Follower => kill(site, Site::followers).await?,
            Self::Router => kill(site, |site| site.processes("router")).await?,
            Self::Allocator => kill(site, |site| site.processes("slurm-allocator")).await?,
            Self::LaptopGone => {
                site.lab.cut_wan()?;
                site.power_off()?;
                tokio::time::sleep(lasts).await;
                site.lab.mend_wan()?;
                site.up().await?;
            }
            Self::Slurmctld => {
                site.lab.kill("ctl", "slurmctld")?;
                tokio::time::sleep(lasts).await;
                site.lab.begin("ctl", "slurmctld")?;
            }
            Self::Slurmd => {
                site.lab.kill(&host, "slurmd")?;
                tokio::time::sleep(lasts).await;
                site.lab.begin(&host, "slurmd")?;
            }
            Self::Host => {
                site.lab.crash(&host)?;
                tokio::time::sleep(lasts).await;
                site.lab.up()?;
            }
            Self::Link => {
                site.lab.cut(&host)?;
                tokio::time::sleep(lasts).await;
                site.lab.mend(&host)?;
            }
            Self::Requeue => {
                site.lab.run("login", &["scontrol", "requeue", &job])?;
            }
            Self::Scancel => {
                site.lab.run("login", &["scancel", &job])?;
            }
            Self::Walltime => tokio::time::sleep(lasts).await,
            Self::Quota => {
                site.lab.fill()?;
                tokio::time::sleep(lasts).await;
                site.lab.free()?;
            }
        }
        Ok(())
    }
}

/// Kills a daemon three times, each time when it runs again.
async fn kill(site: &Site, find: impl Fn(&Site) -> anyhow::Result<Vec<u32>>) -> anyhow::Result<()> {
    for _ in 0..3 {
        let pids = site.wait("a process to kill", || Ok(Some(find(site)?).filter(|pids| !pids.is_empty())))?;
        for &pid in &pids {
            signal(pid, Signal::KILL)?;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        ensure!(find(site)?.iter().all(|pid| !pids.contains(pid)), "it was killed and lives");
    }
    Ok(())
}

/// What can happen to an instance there, in the order in which it is done.
pub fn all(seat: Seat) -> Vec<Fault> {
    let possible = |fault: &Fault| seat == Seat::Laptop || !fault.needs_laptop();
    Fault::value_variants().iter().copied().filter(possible).collect()
}
