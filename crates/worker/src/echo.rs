//! The agent that is always there: answers what it was sent, offline, without a program of its own.
//!
//! Before it answers it appends one line per prompt to `echo-ledger.jsonl` in the node's directory and brings it to disk:
//! `{"injection_id", "ts", "length", "head"}`, with the first 80 characters of the prompt. Whoever wants to know whether a
//! prompt was ever carried out twice reads that file.
//!
//! A line of the prompt that begins with `@echo ` is not answered but obeyed. It holds words:
//!
//! | word | what happens |
//! | --- | --- |
//! | `delay=200ms` | waits that long before it answers; can be interrupted |
//! | `deltas=1000` | streams that many deltas instead of the words; the answer then only says so |
//! | `size=300` | bytes of each of those deltas |
//! | `over=2s` | spreads the pieces of the answer evenly over that long; can be interrupted |
//! | `usage=42` | reports that many tokens for the turn |
//! | `crash` | the process is gone at once, as if it had been aborted |
//!
//! and one at the end of a line, which takes the rest of it:
//!
//! | word | what happens |
//! | --- | --- |
//! | `say=TEXT` | answers TEXT instead of the prompt |
//! | `fail=REASON` | the turn fails with REASON |
//! | `approval=COMMAND` | asks for approval, and answers `accepted` or `declined`; a COMMAND with `/` or `..` counts as one that leaves the working directory |
//!
//! Any other word is named in the answer. A prompt steered into a running turn is added to the answer as it is.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use drover_config::HumanDuration;
use drover_types::{ErrorCode, InjectionId};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::agent::{Agent, AgentCommand, AgentEvent, TurnOutcome};

/// Marks a line that is obeyed.
const MARK: &str = "@echo ";
/// Most pieces that a plain answer is streamed in.
const PIECES: usize = 8;
/// Name of the ledger in the node's directory.
pub const LEDGER: &str = "echo-ledger.jsonl";

/// What a prompt asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    text: String,
    delay: Duration,
    over: Duration,
    deltas: Option<u64>,
    size: usize,
    usage: Option<u64>,
    crash: bool,
    fail: Option<String>,
    approvals: Vec<String>,
    /// Words that were not understood.
    unknown: Vec<String>,
}

impl Plan {
    fn of(prompt: &str) -> Self {
        let mut plan = Self { size: 16, ..Self::default() };
        let mut plain = Vec::new();
        let mut said = None;
        for line in prompt.lines() {
            match line.trim_start().strip_prefix(MARK) {
                Some(words) => plan.obey(words.trim(), &mut said),
                None => plain.push(line),
            }
        }
        plan.text = said.unwrap_or_else(|| plain.join("\n").trim().to_owned());
        plan
    }

    fn obey(&mut self, words: &str, said: &mut Option<String>) {
        let mut rest = words;
        while !rest.is_empty() {
            let (word, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let to_the_end = rest.split_once('=').map_or("", |(_, text)| text).trim();
            let understood = match name {
                "say" => {
                    *said = Some(to_the_end.to_owned());
                    return;
                }
                "fail" => {
                    self.fail = Some(to_the_end.to_owned());
                    return;
                }
                "approval" => {
                    self.approvals.push(to_the_end.to_owned());
                    return;
                }
                "delay" => value.parse().map(|HumanDuration(delay)| self.delay = delay).is_ok(),
                "over" => value.parse().map(|HumanDuration(over)| self.over = over).is_ok(),
                "deltas" => value.parse().map(|count| self.deltas = Some(count)).is_ok(),
                "size" => value.parse().map(|size| self.size = size).is_ok(),
                "usage" => value.parse().map(|tokens| self.usage = Some(tokens)).is_ok(),
                "crash" => {
                    self.crash = true;
                    true
                }
                _ => false,
            };
            if !understood {
                self.unknown.push(word.to_owned());
            }
            rest = after.trim_start();
        }
    }
}

/// The built-in agent.
pub struct EchoAgent {
    ledger: PathBuf,
}

impl EchoAgent {
    /// An agent that keeps its ledger in this directory.
    pub fn new(node_dir: &Path) -> Self {
        Self { ledger: node_dir.join(LEDGER) }
    }
}

#[async_trait]
impl Agent for EchoAgent {
    async fn run(self: Box<Self>, commands: mpsc::Receiver<AgentCommand>, events: mpsc::Sender<AgentEvent>) {
        let mut echo = Echo { ledger: self.ledger, commands, events, total_tokens: 0, turn: None, stopped: false };
        // The only error is that nobody listens any more, and then there is nothing left to do.
        let _ = echo.serve().await;
    }
}

/// Nobody listens any more.
struct Gone;

/// The turn that is under way.
struct Running {
    injection: InjectionId,
    interrupted: bool,
    steered: Vec<String>,
    answers: VecDeque<(String, bool)>,
}

/// When each piece of an answer is due.
struct Pace {
    begun: Instant,
    over: Duration,
    count: u64,
    given: u64,
}

impl Pace {
    fn new(over: Duration, count: u64) -> Self {
        Self { begun: Instant::now(), over, count: count.max(1), given: 0 }
    }

    /// When the next piece is due; the last one at the end of the time.
    fn next(&mut self) -> Instant {
        self.given += 1;
        self.begun + self.over.mul_f64(self.given as f64 / self.count as f64)
    }
}

struct Echo {
    ledger: PathBuf,
    commands: mpsc::Receiver<AgentCommand>,
    events: mpsc::Sender<AgentEvent>,
    total_tokens: u64,
    turn: Option<Running>,
    stopped: bool,
}

impl Echo {
    async fn serve(&mut self) -> Result<(), Gone> {
        self.send(AgentEvent::Ready { detail: json!({ "agent": "echo" }), pid: None }).await?;
        while !self.stopped {
            let command = self.commands.recv().await.ok_or(Gone)?;
            let AgentCommand::Begin { injection, prompt, .. } = command else {
                self.obey(command).await?;
                continue;
            };
            self.turn = Some(Running {
                injection: injection.clone(),
                interrupted: false,
                steered: Vec::new(),
                answers: VecDeque::new(),
            });
            let outcome = self.answer(&injection, &prompt).await?;
            self.turn = None;
            self.send(AgentEvent::TurnEnded { injection, outcome }).await?;
        }
        Ok(())
    }

    /// Runs one turn to its end.
    async fn answer(&mut self, injection: &InjectionId, prompt: &str) -> Result<TurnOutcome, Gone> {
        if let Err(error) = self.note(injection, prompt).await {
            let error = format!("the ledger {} cannot be written: {error}", self.ledger.display());
            return Ok(TurnOutcome::failed(ErrorCode::StoreUnavailable, error));
        }
        let plan = Plan::of(prompt);
        if plan.crash {
            std::process::exit(134);
        }
        self.pause_until(Instant::now() + plan.delay).await?;
        let mut text = plan.text;
        for word in &plan.unknown {
            add_line(&mut text, &format!("unknown directive {word:?}"));
        }
        for (index, command) in plan.approvals.iter().enumerate() {
            let approved = self.ask(injection, index, command).await?;
            add_line(&mut text, if approved { "accepted" } else { "declined" });
        }
        for steered in self.take_steered() {
            add_line(&mut text, &steered);
        }
        if self.interrupted() {
            return Ok(TurnOutcome::interrupted(""));
        }
        if let Some(reason) = plan.fail {
            let data = json!({ "message": reason });
            self.say(injection, "agent_error", data).await?;
            return Ok(TurnOutcome::failed(ErrorCode::Internal, reason));
        }
        if let Some(count) = plan.deltas {
            self.stream(injection, count, plan.size, plan.over).await?;
            text = format!("{count} deltas of {} bytes", plan.size);
        } else {
            let pieces = pieces(&text);
            let mut pace = Pace::new(plan.over, pieces.len() as u64);
            for piece in pieces {
                self.pause_until(pace.next()).await?;
                if self.interrupted() {
                    break;
                }
                self.say(injection, "assistant_delta", json!({ "content": piece })).await?;
            }
        }
        if self.interrupted() {
            return Ok(TurnOutcome::interrupted(""));
        }
        // What was steered in while the answer was streamed.
        for steered in self.take_steered() {
            self.say(injection, "assistant_delta", json!({ "content": format!("\n{steered}") })).await?;
            add_line(&mut text, &steered);
        }
        self.report_usage(injection, prompt, &text, plan.usage).await?;
        self.say(injection, "assistant", json!({ "content": text, "final_answer": true })).await?;
        Ok(TurnOutcome::completed(text))
    }

    async fn stream(&mut self, injection: &InjectionId, count: u64, size: usize, over: Duration) -> Result<(), Gone> {
        let mut pace = Pace::new(over, count);
        for index in 0..count {
            self.pause_until(pace.next()).await?;
            if index % 64 == 0 {
                while let Ok(command) = self.commands.try_recv() {
                    self.obey(command).await?;
                }
            }
            if self.interrupted() {
                return Ok(());
            }
            let mut content = format!("{index} ");
            content.extend(std::iter::repeat_n('.', size.saturating_sub(content.len())));
            content.truncate(size);
            self.say(injection, "assistant_delta", json!({ "content": content })).await?;
        }
        Ok(())
    }

    async fn report_usage(
        &mut self,
        injection: &InjectionId,
        prompt: &str,
        text: &str,
        wanted: Option<u64>,
    ) -> Result<(), Gone> {
        let count = |text: &str| text.split_whitespace().count() as u64;
        let (input, output) = match wanted {
            Some(tokens) => (0, tokens),
            None => (count(prompt), count(text)),
        };
        self.total_tokens += input + output;
        let data = json!({
            "total_tokens": self.total_tokens,
            "last_total_tokens": input + output,
            "last_input_tokens": input,
            "last_output_tokens": output,
        });
        self.say(injection, "usage", data).await
    }

    /// Asks for approval and waits for the word; an interrupt is a no.
    async fn ask(&mut self, injection: &InjectionId, index: usize, command: &str) -> Result<bool, Gone> {
        let approval_id = format!("{injection}-{index}");
        let data = json!({
            "turn_id": injection.as_str(), "command": command, "reason": "the prompt asked for it",
            "available_decisions": ["accept", "decline"],
        });
        self.send(AgentEvent::ApprovalWanted {
            injection: injection.clone(),
            approval_id: approval_id.clone(),
            call_id: format!("call-{index}-{injection}"),
            inside_workspace: !command.contains('/') && !command.contains(".."),
            data,
        })
        .await?;
        loop {
            let Some(turn) = &mut self.turn else { return Ok(false) };
            if turn.interrupted {
                return Ok(false);
            }
            if let Some((_, approved)) = turn.answers.iter().find(|(id, _)| *id == approval_id) {
                return Ok(*approved);
            }
            let command = self.commands.recv().await.ok_or(Gone)?;
            self.obey(command).await?;
        }
    }

    /// Waits, and obeys what comes meanwhile. An interrupt ends the wait.
    async fn pause_until(&mut self, end: Instant) -> Result<(), Gone> {
        while !self.interrupted() && Instant::now() < end {
            tokio::select! {
                () = sleep_until(end) => {}
                command = self.commands.recv() => self.obey(command.ok_or(Gone)?).await?,
            }
        }
        Ok(())
    }

    /// Carries out a command that may come at any time.
    async fn obey(&mut self, command: AgentCommand) -> Result<(), Gone> {
        match (command, &mut self.turn) {
            (AgentCommand::Steer { injection, into, prompt }, Some(turn)) if turn.injection == into => {
                turn.steered.push(prompt.clone());
                // A prompt that cannot be noted is carried out all the same: its turn is under way.
                let _ = self.note(&injection, &prompt).await;
            }
            (AgentCommand::Steer { injection, prompt, .. }, _) => {
                self.send(AgentEvent::SteerRefused { injection, prompt }).await?;
            }
            (AgentCommand::Interrupt { injection } | AgentCommand::Leave { injection }, Some(turn))
                if turn.injection == injection =>
            {
                turn.interrupted = true;
            }
            (AgentCommand::Answer { approval_id, approved, .. }, Some(turn)) => {
                turn.answers.push_back((approval_id, approved));
            }
            (AgentCommand::Stop, turn) => {
                self.stopped = true;
                if let Some(turn) = turn {
                    turn.interrupted = true;
                }
            }
            // An interrupt or an answer for a turn that is over.
            (AgentCommand::Interrupt { .. } | AgentCommand::Leave { .. } | AgentCommand::Answer { .. }, _) => {}
            // The worker never begins a turn while one runs.
            (AgentCommand::Begin { injection, .. }, _) => {
                let outcome = TurnOutcome::failed(ErrorCode::Internal, "a turn was begun while another one ran");
                self.send(AgentEvent::TurnEnded { injection, outcome }).await?;
            }
        }
        Ok(())
    }

    /// The prompts steered into the turn since the last look.
    fn take_steered(&mut self) -> Vec<String> {
        self.turn.as_mut().map(|turn| std::mem::take(&mut turn.steered)).unwrap_or_default()
    }

    fn interrupted(&self) -> bool {
        self.turn.as_ref().is_some_and(|turn| turn.interrupted)
    }

    async fn say(&self, injection: &InjectionId, kind: &str, data: Value) -> Result<(), Gone> {
        self.send(AgentEvent::Event { injection: injection.clone(), kind: kind.to_owned(), data }).await
    }

    async fn send(&self, event: AgentEvent) -> Result<(), Gone> {
        self.events.send(event).await.map_err(|_| Gone)
    }

    /// One line in the ledger, on disk before this returns.
    async fn note(&self, injection: &InjectionId, prompt: &str) -> io::Result<()> {
        let line = json!({
            "injection_id": injection.as_str(),
            "ts": drover_service::now_us(),
            "length": prompt.len(),
            "head": prompt.chars().take(80).collect::<String>(),
        });
        let path = self.ledger.clone();
        let written = tokio::task::spawn_blocking(move || append_synced(&path, format!("{line}\n").as_bytes())).await;
        written.map_err(io::Error::other)?
    }
}

/// Appends a whole line or nothing.
fn append_synced(path: &Path, line: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    let before = file.metadata()?.len();
    let undo = |file: &File, error| {
        // A half line would swallow the next one.
        let _ = file.set_len(before);
        Err(error)
    };
    if let Err(error) = file.write_all(line) {
        return undo(&file, error);
    }
    match file.sync_data() {
        Ok(()) => Ok(()),
        Err(error) => undo(&file, error),
    }
}

fn add_line(text: &mut String, line: &str) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(line);
}

/// Cuts a text into at most a few pieces at its words; together they are the text.
fn pieces(text: &str) -> Vec<&str> {
    let words: Vec<&str> = text.split_inclusive(char::is_whitespace).collect();
    let per_piece = words.len().div_ceil(PIECES).max(1);
    let mut found = Vec::new();
    let mut rest = text;
    for group in words.chunks(per_piece) {
        let (piece, after) = rest.split_at(group.iter().map(|word| word.len()).sum());
        found.push(piece);
        rest = after;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_obeyed_and_the_rest_is_answered() {
        let plan =
            Plan::of("hello\n@echo delay=200ms over=2s usage=7 bogus size=x\n  @echo approval=rm -rf a=b\nthere");
        let expected = Plan {
            text: "hello\nthere".into(),
            delay: Duration::from_millis(200),
            over: Duration::from_secs(2),
            size: 16,
            usage: Some(7),
            approvals: vec!["rm -rf a=b".into()],
            unknown: vec!["bogus".into(), "size=x".into()],
            ..Plan::default()
        };
        assert_eq!(plan, expected);
        assert_eq!(Plan::of("ignored\n@echo deltas=3 say=two words").text, "two words");
        assert_eq!(Plan::of("@echo fail=no disk").fail.as_deref(), Some("no disk"));
        assert!(Plan::of("@echo crash").crash);
        assert_eq!(Plan::of("say @echo crash in a line").text, "say @echo crash in a line");
    }

    #[tokio::test]
    async fn an_answer_is_spread_over_its_time_takes_in_what_is_steered_and_ends_when_interrupted() {
        let dir = tempfile::tempdir().unwrap();
        let (commands, received) = mpsc::channel(8);
        let (sent, mut events) = mpsc::channel(64);
        let agent = Box::new(EchoAgent::new(dir.path()));
        let run = agent.run(received, sent);
        let drive = async {
            let first = "first".parse::<InjectionId>().unwrap();
            let begin = |injection: &InjectionId| AgentCommand::Begin {
                injection: injection.clone(),
                prompt: "@echo deltas=4 over=800ms".to_owned(),
                trace: None,
            };
            let begun = Instant::now();
            commands.send(begin(&first)).await.unwrap();
            let mut deltas = Vec::new();
            let outcome = loop {
                match events.recv().await.unwrap() {
                    AgentEvent::Event { kind, data, .. } if kind == "assistant_delta" => {
                        deltas.push((begun.elapsed(), data["content"].as_str().unwrap().trim().to_owned()));
                        if deltas.len() == 2 {
                            let (injection, into) = ("steered".parse::<InjectionId>().unwrap(), first.clone());
                            let steer = AgentCommand::Steer { injection, into, prompt: "faster".to_owned() };
                            commands.send(steer).await.unwrap();
                        }
                    }
                    AgentEvent::TurnEnded { outcome, .. } => break outcome,
                    _ => {}
                }
            };
            assert_eq!(deltas.len(), 5, "{deltas:?}");
            for (index, (at, _)) in deltas.iter().enumerate() {
                let due = Duration::from_millis(200 * (index as u64 + 1).min(4));
                assert!(*at >= due, "{deltas:?}");
            }
            assert_eq!(deltas[4].1, "faster");
            assert_eq!(outcome, TurnOutcome::completed("4 deltas of 16 bytes\nfaster".to_owned()));

            let second = "second".parse::<InjectionId>().unwrap();
            commands.send(begin(&second)).await.unwrap();
            commands.send(AgentCommand::Interrupt { injection: second }).await.unwrap();
            let mut pieces = 0;
            let outcome = loop {
                match events.recv().await.unwrap() {
                    AgentEvent::Event { .. } => pieces += 1,
                    AgentEvent::TurnEnded { outcome, .. } => break outcome,
                    _ => {}
                }
            };
            assert_eq!(outcome, TurnOutcome::interrupted(""));
            assert!(pieces < 4, "the interrupt did not cut it short");
            commands.send(AgentCommand::Stop).await.unwrap();
            while events.recv().await.is_some() {}
        };
        tokio::join!(run, drive);
    }

    #[test]
    fn pieces_are_few_and_make_the_text() {
        for text in ["", "one", "a b  c\nd", &"wörd ".repeat(100)] {
            let pieces = pieces(text);
            assert!(pieces.len() <= PIECES, "{pieces:?}");
            assert_eq!(pieces.concat(), text);
        }
    }
}
