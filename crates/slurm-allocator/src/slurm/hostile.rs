//! What Slurm's programs answer may have anything in it: other people choose names, comments, reasons, partitions, and sites print what
//! they like. Through the parsers and the state machine to what is shown, every field once with every value: it ends no swarm, makes no job,
//! stays short, and does nothing to a terminal.

use std::collections::VecDeque;

use bytes::Bytes;
use drover_ssh::{Exit, Output};
use drover_types::SwarmId;

use super::calls::answer;
use super::core::{Answer, Call, CallId, Core, Input, SECOND, Settings, View};
use super::parse::{history, is_shown, partitions, show};

/// More is shown of nothing.
const MOST_SHOWN: usize = 2000;

fn values() -> Vec<String> {
    let mut values: Vec<String> = [
        "",
        "a'b",
        "a\"b",
        "a\nb",
        "\n7|COMPLETED|None|n1|N/A|drover-s.1|drover:s:1",
        "\n7|FAILED|1:0|drover-s.1",
        "a\0b",
        "$(touch pwned)",
        "`touch pwned`",
        "-rf",
        "--all",
        "|||||||||",
        "\u{1b}[2J\u{1b}]0;x\u{7}",
        "\u{9b}31m\r\u{8}",
        "\u{202e}gnp.exe",
        "n[1-4000000000][1-4000000000]x[",
        "99999999999999999999999999",
        "../../../etc/passwd",
        "JobState=COMPLETED ExitCode=0:0",
        "\u{fffd}\u{1f980}",
    ]
    .map(str::to_owned)
    .into();
    values.push("x".repeat(1 << 20));
    values.push("[".repeat(1 << 20));
    values.push(",".repeat(1 << 20));
    values
}

fn output(status: u32, stdout: &str, stderr: &str) -> Output {
    let bytes = |text: &str| Bytes::from(text.to_owned());
    Output { exit: Exit::Code(status), stdout: bytes(stdout), stderr: bytes(stderr) }
}

fn id() -> SwarmId {
    "s".parse().unwrap()
}

/// A cluster with one swarm, whose job 7 runs.
struct Rig {
    core: Core,
    now: u64,
    calls: VecDeque<(CallId, Call)>,
}

impl Rig {
    fn new() -> Self {
        let settings = Settings {
            poll: 30 * SECOND,
            calls_per_minute: 1000,
            keep_over: 3600 * SECOND,
            horizon: 60 * SECOND,
            quiet: 60 * SECOND,
        };
        let now = 1_795_262_400 * SECOND;
        let mut rig = Self { core: Core::new(settings, now), now, calls: VecDeque::new() };
        rig.core.apply(now, Input::Launch { swarm: id(), nodes: 2, limit: None });
        rig
    }

    fn running() -> Self {
        let mut rig = Self::new();
        rig.next(|call| matches!(call, Call::Queue), &output(0, &queue(&[]), ""));
        rig.next(|call| matches!(call, Call::Submit(_)), &output(0, "7\n", ""));
        rig.next(|call| matches!(call, Call::Queue), &output(0, &queue(&[ROW.map(str::to_owned)]), ""));
        assert_eq!(rig.view().word, "RUNNING");
        rig
    }

    /// Answers the next call of a kind, and all before it with a queue in which nothing has changed. What the call was.
    fn next(&mut self, wanted: impl Fn(&Call) -> bool, said: &Output) -> Call {
        for _ in 0..1000 {
            self.calls.extend(self.core.advance(self.now).calls);
            while let Some((call, what)) = self.calls.pop_front() {
                let is_wanted = wanted(&what);
                let answer = match &what {
                    what if is_wanted => answer(what, said),
                    Call::Queue => answer(&what, &output(0, &queue(&[]), "")),
                    other => panic!("{other:?}"),
                };
                self.now += SECOND / 10;
                self.core.apply(self.now, Input::Answered { call, answer });
                if is_wanted {
                    return what;
                }
            }
            self.now = self.core.next_deadline().expect("something is due").max(self.now);
        }
        panic!("that call is never made");
    }

    fn view(&self) -> View {
        self.core.view(&id()).unwrap()
    }

    /// The swarm lives, has its job, and all that is shown of it is short and plain.
    fn is_well(&self, what: &str) {
        let view = self.view();
        assert!(!view.over && view.job == Some(7), "{what}: {view:?}");
        self.is_plain(what);
    }

    fn is_plain(&self, what: &str) {
        let view = self.view();
        let of_nodes = view.nodes.iter().flat_map(|node| [&node.host, &node.reason]);
        for text in of_nodes.chain([&view.word, &view.reason]) {
            plain(what, text);
        }
        for orphan in self.core.orphans().values() {
            plain(what, orphan.state.as_str());
            plain(what, orphan.tag.swarm.as_str());
        }
        plain(what, &self.core.trouble().unwrap_or_default());
        let record = serde_json::to_string(&self.core.record(&id())).unwrap();
        assert!(record.len() < 100_000, "{what}: {} bytes are kept", record.len());
    }
}

fn plain(what: &str, text: &str) {
    assert!(text.len() <= MOST_SHOWN, "{what}: {} bytes are shown", text.len());
    assert!(text.chars().all(is_shown), "{what}: {text:?}");
}

const ROW: [&str; 7] = ["7", "RUNNING", "None", "n[1-2]", "N/A", "drover-s.1", "drover:s:1"];

fn queue(rows: &[[String; 7]]) -> String {
    let mut text = "JOBID|STATE|REASON|NODELIST|START_TIME|NAME|COMMENT\n".to_owned();
    for row in rows {
        text.push_str(&row.join("|"));
        text.push('\n');
    }
    text
}

/// A row with one field changed.
fn with<const N: usize>(row: [&str; N], field: usize, value: &str) -> [String; N] {
    let mut row = row.map(str::to_owned);
    value.clone_into(&mut row[field]);
    row
}

fn brief(value: &str) -> String {
    value.chars().take(40).collect()
}

#[test]
fn a_queue_with_anything_in_it_ends_no_swarm() {
    for value in values() {
        for field in 0..ROW.len() {
            // A line of the site's own before a whole row of ours: nothing tells it from a row of ours.
            if field == 0 && value.starts_with("\n7|COMPLETED") {
                continue;
            }
            let what = format!("field {field} of squeue is {:?}", brief(&value));
            // Our own job, and another one of this user before and behind it.
            let stranger = with(["15", "RUNNING", "None", "n3", "N/A", "drover-t.1", ""], field, &value);
            let mine = || ROW.map(str::to_owned);
            for rows in [vec![with(ROW, field, &value)], vec![stranger.clone(), mine()], vec![mine(), stranger]] {
                let mut rig = Rig::running();
                rig.next(|call| matches!(call, Call::Queue), &output(0, &queue(&rows), ""));
                rig.is_well(&what);
            }
        }
        let mut rig = Rig::running();
        rig.next(|call| matches!(call, Call::Queue), &output(1, &value, &format!("squeue: error: {value}")));
        rig.is_well("squeue complains");
    }
}

#[test]
fn a_history_with_anything_in_it_gives_the_swarm_no_end_of_its_own_making() {
    let row = ["7", "RUNNING", "0:0", "drover-s.1"];
    for value in values() {
        for field in 0..row.len() {
            let what = format!("field {field} of sacct is {:?}", brief(&value));
            let mut rig = Rig::running();
            let text = with(row, field, &value).join("|") + "\n";
            rig.next(|call| matches!(call, Call::History { .. }), &output(0, &text, ""));
            // A line end that is followed by a whole row of ours is one: nobody but Slurm is asked with our names.
            if value.starts_with("\n7|FAILED") {
                rig.is_plain(&what);
            } else {
                rig.is_well(&what);
            }
            for past in history::read(&text) {
                plain(&what, &past.exit);
            }
        }
        let mut rig = Rig::running();
        rig.next(|call| matches!(call, Call::History { .. }), &output(1, &value, &value));
        rig.is_well("sacct complains");
    }
}

#[test]
fn what_the_controller_says_of_a_job_is_read_by_its_fields_only() {
    for value in values() {
        for line in [
            format!("JobId=7 JobName={value} UserId=me(1) JobState=RUNNING Reason=None ExitCode=0:0\n"),
            format!("JobId=7 JobName=drover-s.1 UserId=me(1) JobState=RUNNING Reason={value} ExitCode=0:0\n"),
            format!("JobId=7 JobName=drover-s.1 UserId=me(1) JobState=RUNNING Comment={value}\n"),
            format!("JobId=7 JobName=drover-s.1 UserId=me(1) JobState={value} ExitCode={value}\n"),
            value.clone(),
        ] {
            let Some(past) = show::read(&line, 7) else { continue };
            assert!(!matches!(past.state.as_str(), "COMPLETED" | "FAILED"), "{:?}: {past:?}", brief(&line));
            plain("scontrol", past.state.as_str());
            plain("scontrol", &past.exit);
        }
    }
}

#[test]
fn sbatch_may_say_anything_and_makes_one_job_at_most() {
    for value in values() {
        for said in [output(0, &value, ""), output(0, &format!("{value}\n7;{value}\n"), &value)] {
            let mut rig = Rig::new();
            rig.next(|call| matches!(call, Call::Queue), &output(0, &queue(&[]), ""));
            let call = rig.next(|call| matches!(call, Call::Submit(_)), &said);
            let job = match answer(&call, &said) {
                Answer::Submitted { job } => Some(job),
                Answer::Unsure(_) => None,
                other => panic!("{:?}: {other:?}", brief(&value)),
            };
            assert_eq!(rig.view().job, job);
            rig.is_plain(&format!("sbatch says {:?}", brief(&value)));
        }
        let mut rig = Rig::new();
        rig.next(|call| matches!(call, Call::Queue), &output(0, &queue(&[]), ""));
        let said = output(1, &value, &format!("sbatch: error: {value}"));
        let call = rig.next(|call| matches!(call, Call::Submit(_)), &said);
        if let Answer::Rejected(failure) = answer(&call, &said) {
            plain("sbatch refuses", &failure.message);
        }
        rig.is_plain("sbatch refuses");
    }
}

#[test]
fn partitions_may_be_called_anything() {
    let row = ["batch", "up", "1-00:00:00", "4", "idle"];
    for value in values() {
        for field in 0..row.len() {
            let text = with(row, field, &value).join("|") + "\n";
            let known = partitions::read(&text.repeat(if value.len() < 100 { 5000 } else { 1 }));
            let what = format!("field {field} of sinfo is {:?}", brief(&value));
            for names in ["batch", "other", "other,batch"] {
                match partitions::check(&known, names, 2, None) {
                    Ok(words) => plain(&what, &words),
                    Err(failure) => plain(&what, &failure.message),
                }
            }
        }
    }
    let many: Vec<String> = (0..5000).map(|n| format!("partition-{n}|up|1:00|4|idle")).collect();
    let failure = partitions::check(&partitions::read(&many.join("\n")), "none", 1, None).unwrap_err();
    assert!(failure.message.contains("and 4970 more"), "{failure}");
}
