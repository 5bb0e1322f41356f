//! Jobs: real processes with a beginning and an end.

use drover_service::process::{self, ProcessId};
use drover_testkit::fake_slurm::{Phase, Plan, Settings, Truth};
use rustix::process::{Pid, Signal, kill_process};

use super::{Fake, exists, until};

#[test]
fn a_job_gets_its_nodes_its_environment_and_one_task_on_each() {
    let fake = Fake::fast();
    let job = fake.submit(
        &["--nodes=3", "--ntasks-per-node=1", "--time=600", "--job-name=drover-x", "--export=ALL,EXTRA=a b"],
        "srun sh -c 'echo $SLURM_PROCID $SLURM_NODEID $SLURMD_NODENAME $SLURM_STEP_NODELIST \"$EXTRA\" >task.$SLURM_PROCID'\n\
         echo \"$SLURM_JOB_ID $SLURM_JOB_NUM_NODES $SLURM_JOB_NODELIST ${SLURM_RESTART_COUNT-unset} $PWD\"\nexit 3",
    );
    fake.reaches(job, "FAILED");
    for task in 0..3 {
        let line = format!("{task} {task} n{} n[1-3] a b\n", task + 1);
        assert_eq!(fake.read(&format!("task.{task}")), line);
    }
    let work = std::fs::canonicalize(fake.work()).unwrap();
    assert_eq!(fake.read(&format!("slurm-{job}.out")), format!("{job} 3 n[1-3] unset {}\n", work.display()));
    assert_eq!(fake.says(&["sacct", "-XPn", "-j", &job.to_string(), "-o", "State,ExitCode"]), "FAILED|3:0\n");
}

/// SIGTERM goes to the steps before the limit, the limit ends what is left, and a job that is cancelled gets the time to end in
/// order.
#[test]
fn walltime_warns_first_and_a_cancelled_job_may_end_in_order() {
    let fake = Fake::start(&Plan {
        speed: 60.0,
        settings: Settings { kill_wait_s: 3600, ..Settings::default() },
        ..Plan::default()
    });
    // The step lives through one SIGTERM, not through two.
    let script = "trap 'echo shell >>shell; exit' TERM\n\
                  srun --nodes=1 sh -c 'trap \"echo warned >>warned; trap - TERM\" TERM; touch ready; while :; do sleep 0.02; done' &\n\
                  while :; do wait; sleep 0.02; done";
    let job = fake.submit(&["--nodes=1", "--time=600", "--signal=TERM@3540"], script);
    until("the step is ready", || exists(&fake.work().join("ready")), || fake.state(job));
    let limit = |minutes| {
        fake.says(&["scontrol", "update", &format!("JobId={job}"), &format!("TimeLimit={minutes}")]);
    };
    limit(60);
    until("the step was warned", || fake.read("warned") == "warned\n", || fake.state(job));
    assert_eq!(fake.state(job), "RUNNING", "59 minutes are left, and the shell was not told");
    assert_eq!(fake.read("shell"), "");
    limit(1);
    fake.reaches(job, "TIMEOUT");
    assert_eq!(fake.slurm.processes().unwrap(), [], "nothing is left of it");
    assert_eq!(fake.read("shell"), "shell\n");

    let job =
        fake.submit(&["--time=600"], "trap 'echo in order >ended; exit' TERM\ntouch up\nwhile :; do sleep 0.02; done");
    until("the script runs", || exists(&fake.work().join("up")), || fake.state(job));
    fake.says(&["scancel", &job.to_string()]);
    fake.reaches(job, "CANCELLED");
    assert_eq!(fake.read("ended"), "in order\n");
}

/// A node that is cut off: its job runs elsewhere for the second time while the old task goes on, until the node is back.
#[test]
fn a_lost_node_requeues_its_job_and_a_cut_one_goes_on_writing() {
    let fake = Fake::fast();
    let script = "srun sh -c 'echo $$ >>\"$SLURMD_NODENAME.${SLURM_RESTART_COUNT-unset}\"; sleep 1000'";
    let job = fake.submit(&["--nodes=1", "--time=600"], script);
    until("it runs on n1", || fake.read("n1.unset").ends_with('\n'), || fake.state(job));
    let first: ProcessId = process::of(fake.read("n1.unset").trim().parse().unwrap()).unwrap();

    fake.slurm.node("n1", Truth::Cut).unwrap();
    until("it runs on n2", || fake.read("n2.1").ends_with('\n'), || format!("{:?}", fake.slurm.job(job)));
    assert!(process::is_alive(&first), "what runs on a node that was cut off goes on");
    assert!(fake.says(&["sinfo", "-h", "-N", "-o", "%N %t"]).contains("n1 down*\n"));
    fake.slurm.node("n1", Truth::Fine).unwrap();
    until("what was left there is ended", || !process::is_alive(&first), || fake.state(job));

    let second: ProcessId = process::of(fake.read("n2.1").trim().parse().unwrap()).unwrap();
    fake.slurm.node("n2", Truth::Lost).unwrap();
    until("what was on a lost node is dead", || !process::is_alive(&second), || fake.state(job));
    until("it runs for the third time", || fake.read("n1.2").ends_with('\n'), || format!("{:?}", fake.slurm.job(job)));
    assert_eq!(fake.slurm.job(job).unwrap().restarts, 2);

    let pinned = fake.submit(&["--no-requeue", "--nodelist=n3", "--time=600"], "sleep 1000");
    fake.reaches(pinned, "RUNNING");
    fake.slurm.node("n3", Truth::Lost).unwrap();
    fake.reaches(pinned, "NODE_FAIL");
}

/// The controller is killed while a job runs and while one ends; the next command starts another, which has missed nothing.
#[test]
fn a_controller_that_is_killed_loses_nothing() {
    let fake = Fake::fast();
    let kill = || {
        let controller = fake.slurm.dir().controller().unwrap();
        kill_process(Pid::from_raw(controller.pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
        until("the controller is dead", || !process::is_alive(&controller), String::new);
    };
    let job = fake.submit(&["--time=600"], "touch up\nwhile ! [ -e go ]; do sleep 0.02; done\nexit 7");
    until("the script runs", || exists(&fake.work().join("up")), || fake.state(job));
    kill();
    std::fs::write(fake.work().join("go"), "").unwrap();
    assert!(fake.says(&["squeue", "-h", "-o", "%i %T"]).contains(&job.to_string()));
    fake.reaches(job, "FAILED");
    assert_eq!(fake.slurm.job(job).unwrap().end().unwrap().status, 7, "also what ended without a controller is known");

    let job = fake.submit(&["--time=600"], "trap '' TERM\nsleep 1000");
    fake.reaches(job, "RUNNING");
    fake.says(&["scancel", &job.to_string()]);
    kill();
    assert!(matches!(
        fake.slurm.job(job).unwrap().phase,
        Phase::Running(_) | Phase::Ending { .. } | Phase::Over { .. }
    ));
    fake.says(&["squeue"]);
    fake.reaches(job, "CANCELLED");
    assert_eq!(fake.slurm.processes().unwrap(), []);
}

#[test]
fn the_cluster_ends_with_its_owner() {
    let fake = Fake::fast();
    let job = fake.submit(&["--time=600"], "trap '' TERM\ntouch up\nwhile :; do sleep 0.05; done");
    until("the script runs", || exists(&fake.work().join("up")), || fake.state(job));
    let controller = fake.slurm.dir().controller().unwrap();
    // A process that is not there any more: this one, had it started at another time.
    let gone = ProcessId { start_time: 0, ..ProcessId::current() };
    fake.slurm.change(|cluster| cluster.owner = Some(gone)).unwrap();
    until("the controller has ended", || !process::is_alive(&controller), || fake.state(job));
    assert_eq!(fake.slurm.processes().unwrap(), []);
}

#[test]
fn nothing_outlives_the_cluster() {
    let fake = Fake::fast();
    let script = "srun sh -c 'trap \"\" TERM; (sleep 1000 & echo $! >>\"pid.$SLURM_PROCID\"; wait)'";
    let job = fake.submit(&["--nodes=2", "--time=600"], script);
    let pids = || ["pid.0", "pid.1"].map(|name| fake.read(name).trim().parse().ok().and_then(process::of));
    until("both tasks run", || pids().iter().all(Option::is_some), || fake.state(job));
    let tasks = pids().map(Option::unwrap);
    let controller = fake.slurm.dir().controller().unwrap();
    fake.slurm.stop().unwrap();
    assert!(!tasks.iter().chain([&controller]).any(process::is_alive));
    // Again, and a command that comes late: nothing starts.
    fake.slurm.stop().unwrap();
    fake.call(&["squeue"]);
    assert!(!process::is_alive(&fake.slurm.dir().controller().unwrap()));
}
