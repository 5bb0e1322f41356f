//! The fake Slurm: that it answers as the real one was recorded to, and that its jobs live and die as they should.
#![expect(clippy::unwrap_used, reason = "what this needs must be there")]

mod conformance;
mod jobs;
mod outcomes;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use drover_testkit::fake_slurm::{FakeSlurm, Plan};

/// A fake cluster in a directory of its own, which is also where commands are called.
struct Fake {
    slurm: FakeSlurm,
    dir: tempfile::TempDir,
}

impl Fake {
    fn start(plan: &Plan) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        let slurm = FakeSlurm::start(&dir.path().join("slurm"), plan).unwrap();
        Self { slurm, dir }
    }

    fn fast() -> Self {
        Self::start(&Plan { speed: 30.0, ..Plan::default() })
    }

    fn work(&self) -> std::path::PathBuf {
        self.dir.path().join("work")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.slurm.bin().join(args[0]));
        command.args(&args[1..]).current_dir(self.work()).env("PATH", self.slurm.path().unwrap()).env("TZ", "UTC");
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a call that succeeds.
    fn says(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn submit(&self, args: &[&str], script: &str) -> u32 {
        let path = self.work().join("job.sh");
        std::fs::write(&path, format!("#!/bin/bash\n{script}\n")).unwrap();
        let all: Vec<&str> =
            ["sbatch", "--parsable"].iter().chain(args).chain(&[path.to_str().unwrap()]).copied().collect();
        self.says(&all).trim().parse().unwrap()
    }

    fn state(&self, job: u32) -> String {
        self.slurm.job(job).unwrap().state().to_owned()
    }

    fn reaches(&self, job: u32, state: &str) {
        until(&format!("job {job} is {state}"), || self.state(job) == state, || format!("{:?}", self.slurm.job(job)));
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.work().join(name)).unwrap_or_default()
    }
}

/// Waits for something, and says what is there instead when it does not come.
fn until(what: &str, mut is: impl FnMut() -> bool, instead: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < deadline, "not so after 30 s: {what}; {}", instead());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn exists(path: &Path) -> bool {
    std::fs::exists(path).unwrap()
}
