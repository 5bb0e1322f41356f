//! The limits that a batch system or a container puts on this process, from the cgroup file system, v1 and v2.
//!
//! A limit may stand at any level above the process (Slurm sets it on the job, the process sits in a task below), so every
//! level up to the mount is looked at and the tightest one counts.

use std::fs;
use std::path::{Path, PathBuf};

/// A limit of this size or more is none: v1 writes "unlimited" as the largest multiple of a page.
const NO_LIMIT: u64 = 1 << 60;

/// Memory that the tightest level allows and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Most bytes.
    pub limit: u64,
    /// Bytes in use, without what the kernel can drop at once.
    pub used: u64,
}

/// Processor time that the tightest level allows and has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cpu {
    /// Processors, such as 1.5.
    pub limit: f64,
    /// Microseconds of processor time so far.
    pub used_us: u64,
}

/// Where the limits of this process stand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cgroups {
    v2: Vec<PathBuf>,
    memory: Vec<PathBuf>,
    cpu: Vec<PathBuf>,
    cpuacct: Vec<PathBuf>,
}

impl Cgroups {
    /// Looks them up once; a process seldom moves.
    pub fn of_this_process() -> Self {
        let read = |name: &str| fs::read_to_string(Path::new("/proc/self").join(name)).unwrap_or_default();
        Self::parse(&read("cgroup"), &read("mountinfo"))
    }

    /// From the text of `/proc/self/cgroup` and `/proc/self/mountinfo`.
    pub fn parse(cgroup: &str, mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in cgroup.lines() {
            let mut parts = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
            if controllers.is_empty() {
                found.v2 = levels(mountinfo, "cgroup2", None, path);
            }
            for controller in controllers.split(',') {
                let levels = || levels(mountinfo, "cgroup", Some(controller), path);
                match controller {
                    "memory" => found.memory = levels(),
                    "cpu" => found.cpu = levels(),
                    "cpuacct" => found.cpuacct = levels(),
                    _ => {}
                }
            }
        }
        found
    }

    /// The level whose memory is fullest; `None` without a limit.
    pub fn memory(&self) -> Option<Memory> {
        let v2 = self.v2.iter().filter_map(|dir| {
            let limit = number(&dir.join("memory.max"))?;
            let used = number(&dir.join("memory.current"))?;
            Some(Memory { limit, used: used.saturating_sub(droppable(dir, "inactive_file")) })
        });
        let v1 = self.memory.iter().filter_map(|dir| {
            let limit = number(&dir.join("memory.limit_in_bytes"))?;
            let used = number(&dir.join("memory.usage_in_bytes"))?;
            Some(Memory { limit, used: used.saturating_sub(droppable(dir, "total_inactive_file")) })
        });
        let fullness = |memory: &Memory| memory.used as f64 / memory.limit as f64;
        v2.chain(v1)
            .filter(|memory| memory.limit > 0 && memory.limit < NO_LIMIT)
            .max_by(|a, b| fullness(a).total_cmp(&fullness(b)))
    }

    /// The level that allows the fewest processors; `None` without a limit.
    pub fn cpu(&self) -> Option<Cpu> {
        let v2 = self.v2.iter().filter_map(|dir| {
            let text = fs::read_to_string(dir.join("cpu.max")).ok()?;
            let (quota, period) = text.trim().split_once(' ')?;
            let limit = ratio(quota.parse().ok()?, period.parse().ok()?)?;
            Some(Cpu { limit, used_us: field(dir, "cpu.stat", "usage_usec")? })
        });
        let v1 = self.cpu.iter().filter_map(|dir| {
            let quota: i64 = fs::read_to_string(dir.join("cpu.cfs_quota_us")).ok()?.trim().parse().ok()?;
            let limit = ratio(u64::try_from(quota).ok()?, number(&dir.join("cpu.cfs_period_us"))?)?;
            // The two controllers are mounted together almost everywhere; else the levels have the same names.
            let twin = self.cpuacct.iter().find(|other| other.file_name() == dir.file_name()).unwrap_or(dir);
            Some(Cpu { limit, used_us: number(&twin.join("cpuacct.usage"))? / 1000 })
        });
        v2.chain(v1).min_by(|a, b| a.limit.total_cmp(&b.limit))
    }
}

/// The processors in a list such as `0-3,8`; what `Cpus_allowed_list` says.
pub fn cpu_list(text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else { continue };
        found.extend(first..=last.min(first.saturating_add(4096)));
    }
    found
}

fn ratio(quota: u64, period: u64) -> Option<f64> {
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

/// The directories from the process's own level up to the mount.
fn levels(mountinfo: &str, kind: &str, controller: Option<&str>, path: &str) -> Vec<PathBuf> {
    let mount = mountinfo.lines().find_map(|line| {
        // `36 25 0:31 /root /mount/point rw,... - cgroup cgroup rw,memory`
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let (fs_kind, _source, options) = (right.next()?, right.next()?, right.next().unwrap_or_default());
        let fits = fs_kind == kind && controller.is_none_or(|wanted| options.split(',').any(|option| option == wanted));
        let mut left = left.split(' ').skip(3);
        fits.then_some((left.next()?, left.next()?))
    });
    let Some((root, point)) = mount else { return Vec::new() };
    let inside = match path.strip_prefix(root.trim_end_matches('/')) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest.trim_matches('/'),
        // Mounted from elsewhere, as some containers do: the mount itself is our level.
        _ => "",
    };
    let point = PathBuf::from(point);
    let mut levels = vec![point.join(inside)];
    while levels.last().is_some_and(|level| *level != point && levels.len() < 32) {
        let Some(parent) = levels.last().and_then(|level| level.parent()).map(Path::to_owned) else { break };
        levels.push(parent);
    }
    levels
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn droppable(dir: &Path, name: &str) -> u64 {
    field(dir, "memory.stat", name).unwrap_or(0)
}

fn field(dir: &Path, file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join(file)).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn a_limit_on_the_job_binds_the_task_below_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let job = root.join("slurm/job_7");
        put(
            &job,
            &[("memory.max", "1000\n"), ("memory.current", "900"), ("memory.stat", "anon 1\ninactive_file 100\n")],
        );
        put(&job, &[("cpu.max", "150000 100000"), ("cpu.stat", "usage_usec 77\nuser_usec 1\n")]);
        put(&job.join("step_0"), &[("memory.max", "max"), ("memory.current", "5"), ("cpu.max", "max 100000")]);
        put(root, &[("memory.max", "100000"), ("memory.current", "2000")]);
        let mounts = format!("30 25 0:26 / {} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n", root.display());
        let groups = Cgroups::parse("0::/slurm/job_7/step_0\n", &mounts);
        assert_eq!(groups.memory(), Some(Memory { limit: 1000, used: 800 }));
        assert_eq!(groups.cpu(), Some(Cpu { limit: 1.5, used_us: 77 }));
    }

    #[test]
    fn the_older_layout_is_read_too() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let memory = root.join("memory/slurm/uid_1/job_7");
        put(&memory, &[("memory.limit_in_bytes", "4096"), ("memory.usage_in_bytes", "1024"), ("memory.stat", "x 1\n")]);
        put(&root.join("memory"), &[("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "1")]);
        let cpu = root.join("cpu,cpuacct/slurm/uid_1/job_7");
        put(&cpu, &[("cpu.cfs_quota_us", "200000"), ("cpu.cfs_period_us", "100000"), ("cpuacct.usage", "5000000")]);
        put(&root.join("cpu,cpuacct"), &[("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "100000")]);
        let mounts = format!(
            "31 25 0:27 / {0}/memory rw - cgroup cgroup rw,memory\n32 25 0:28 / {0}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n",
            root.display()
        );
        let text = "5:memory:/slurm/uid_1/job_7\n4:cpu,cpuacct:/slurm/uid_1/job_7\n1:name=systemd:/x\n";
        let groups = Cgroups::parse(text, &mounts);
        assert_eq!(groups.memory(), Some(Memory { limit: 4096, used: 1024 }));
        assert_eq!(groups.cpu(), Some(Cpu { limit: 2.0, used_us: 5000 }));
    }

    #[test]
    fn without_limits_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), &[("memory.max", "max\n"), ("memory.current", "5"), ("cpu.max", "max 100000\n")]);
        let mounts = format!("30 25 0:26 /docker/x {} rw - cgroup2 cgroup2 rw\n", dir.path().display());
        for text in ["0::/docker/x\n", "0::/\n", "0::/docker/xyz\n", "", "garbage", "0:"] {
            let groups = Cgroups::parse(text, &mounts);
            assert_eq!((groups.memory(), groups.cpu()), (None, None), "{text}");
        }
        assert_eq!(Cgroups::parse("0::/a", "nonsense - \n - cgroup2"), Cgroups::default());
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(cpu_list("0-2,8\n"), [0, 1, 2, 8]);
        assert_eq!(cpu_list("\t5"), [5]);
        assert!(cpu_list("").is_empty());
    }
}
