//! The agent that is always there: answers what it was told, offline.
//!
//! A line of the prompt that begins with `@echo ` is not answered but obeyed. It holds words:
//!
//! | word | what happens |
//! | --- | --- |
//! | `delay=200ms` | waits that long before it answers |
//! | `over=2s` | spreads the words of the answer evenly over that long |
//! | `recall` | answers how many turns there were before, and what was said first and last |
//! | `size=4096` | answers that many bytes |
//! | `crash` | the process is gone at once, as if it had been aborted |
//! | `tool=WORD` | calls a tool that keeps WORD, under a key, and answers what it says; may stand more than once |
//! | `slow=2s` | has the tools of this turn take that long |
//! | `say=TEXT` | answers TEXT instead of the prompt; takes the rest of the line |
//! | `fail=REASON` | the turn fails with REASON; takes the rest of the line |
//!
//! All that it does outside goes through tools, so a turn that was cut off may run again.

use std::time::Duration;

use async_trait::async_trait;
use drover_config::HumanDuration;
use drover_types::Failure;
use tokio::time::sleep;

use super::{Agent, Conversation, History, Start, TurnAsked, TurnDone, TurnOut};
use crate::session::Role;

/// Marks a line that is obeyed.
const MARK: &str = "@echo ";
/// Most bytes of an answer that is asked for by its size.
const MOST: usize = 2 << 20;

/// The built-in agent.
pub(crate) struct Echo;

#[async_trait]
impl Agent for Echo {
    fn replayable(&self) -> bool {
        true
    }

    fn travels(&self) -> bool {
        false
    }

    async fn begin(&self, start: Start) -> Result<Box<dyn Conversation>, Failure> {
        Ok(Box::new(Talk { history: start.history }))
    }
}

struct Talk {
    history: History,
}

/// What a prompt asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    text: String,
    delay: Duration,
    over: Duration,
    slow: Duration,
    recall: bool,
    size: Option<usize>,
    crash: bool,
    tools: Vec<String>,
    fail: Option<String>,
    unknown: Vec<String>,
}

impl Plan {
    fn of(prompt: &str) -> Self {
        let mut plan = Self::default();
        let (mut plain, mut said) = (Vec::new(), None);
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
            let to_the_end = || rest.split_once('=').map_or("", |(_, text)| text).trim().to_owned();
            let time = |into: &mut Duration| value.parse().map(|HumanDuration(time)| *into = time).is_ok();
            let understood = match name {
                "say" => {
                    *said = Some(to_the_end());
                    return;
                }
                "fail" => {
                    self.fail = Some(to_the_end());
                    return;
                }
                "delay" => time(&mut self.delay),
                "over" => time(&mut self.over),
                "slow" => time(&mut self.slow),
                "size" => value.parse().map(|size: usize| self.size = Some(size.min(MOST))).is_ok(),
                "tool" => {
                    self.tools.push(value.to_owned());
                    !value.is_empty()
                }
                "recall" => {
                    self.recall = true;
                    true
                }
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

#[async_trait]
impl Conversation for Talk {
    async fn turn(&mut self, asked: TurnAsked, out: &TurnOut) -> TurnDone {
        let stop = asked.stop.clone();
        tokio::select! {
            done = self.answer(asked, out) => done,
            () = stop.cancelled() => TurnDone::failed("interrupted"),
        }
    }

    async fn end(self: Box<Self>) {}
}

impl Talk {
    async fn answer(&self, asked: TurnAsked, out: &TurnOut) -> TurnDone {
        let mut plan = Plan::of(&asked.prompt);
        if plan.crash {
            std::process::abort();
        }
        sleep(plan.delay).await;
        for word in &plan.tools {
            match out.call(format!("{} {word}", plan.slow.as_millis())).await {
                Ok(result) => format!("{} {result}", plan.text).trim().clone_into(&mut plan.text),
                Err(failure) => return TurnDone::failed(failure.message),
            }
        }
        if plan.recall {
            let state = match self.history.state().await {
                Ok(state) => state,
                Err(failure) => return TurnDone::failed(failure.message),
            };
            let before: Vec<_> =
                state.messages.iter().filter(|said| said.role == Role::User && said.turn < asked.turn).collect();
            let words =
                |at: Option<&&crate::session::Message>| at.map_or("nothing", |said| said.content.as_str()).to_owned();
            plan.text = format!("{} before: {} .. {}", before.len(), words(before.first()), words(before.last()));
        }
        if let Some(size) = plan.size {
            plan.text = "0123456789abcde ".chars().cycle().take(size).collect();
        }
        if !plan.unknown.is_empty() {
            plan.text = format!("not understood: {}", plan.unknown.join(" "));
        }
        if let Some(reason) = plan.fail {
            return TurnDone::failed(reason);
        }
        let pieces: Vec<&str> = plan.text.split_inclusive(' ').collect();
        let pause = plan.over / pieces.len().max(1) as u32;
        if plan.over.is_zero() {
            out.text(&plan.text).await;
        } else {
            for piece in pieces {
                sleep(pause).await;
                out.text(piece).await;
            }
        }
        TurnDone::answer(plan.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_the_mark_are_obeyed() {
        let plan = Plan::of("one\n@echo delay=5ms tool=a tool=b recall\ntwo");
        assert_eq!((plan.text.as_str(), plan.delay), ("one\ntwo", Duration::from_millis(5)));
        assert_eq!((plan.tools, plan.recall), (vec!["a".to_owned(), "b".to_owned()], true));
        assert_eq!(Plan::of("x\n@echo say=two words").text, "two words");
        assert_eq!(Plan::of("@echo fail=no good").fail.as_deref(), Some("no good"));
        assert_eq!(Plan::of("@echo dance").unknown, ["dance"]);
    }
}
