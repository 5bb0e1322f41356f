//! The small language in which a prompt tells a fake what to do.
//!
//! A prompt may hold any number of directives, each one answer of the fake: `@mock` and then words up to the end of the
//! line or the next `@mock`. A word is `name` or `name=value`; a value with spaces stands in single or double quotes.
//!
//! | directive | what happens |
//! | --- | --- |
//! | `say=TEXT [deltas=N] [delay=50ms] [reasoning=TEXT] [usage=IN,OUT]` | answers with that text in N pieces |
//! | `run=CMD [escalate=true] [workdir=DIR] [then=TEXT]` | runs a command, then says TEXT; `{output}` is what it printed |
//! | `patch=FILE [text=TEXT] [then=TEXT]` | adds a file through the agent's patch tool |
//! | `http=500 [times=N]` | answers that status, N times or always |
//! | `break [times=N]` | cuts the connection in the middle of the answer |
//! | `fail=CODE [message=TEXT]` | reports a failed response |
//! | `incomplete=REASON` | reports an incomplete response |
//! | `hang` | begins an answer and never goes on |
//! | `crash` | the fake app-server aborts; the mock API does not know it |
//!
//! Without a directive the prompt comes back as `echo: PROMPT`.

use std::time::Duration;

/// What marks a directive.
const MARK: &str = "@mock";

/// One answer of the fake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Answers with a text.
    Say(Say),
    /// Has the agent run a command.
    Run {
        /// The command line.
        command: String,
        /// Asks for it to run outside the sandbox.
        escalate: bool,
        /// Where it runs.
        workdir: Option<String>,
    },
    /// Has the agent add a file.
    Patch {
        /// Its path.
        file: String,
        /// Its one line.
        text: String,
    },
    /// Answers with a bare HTTP status.
    Http {
        /// The status.
        status: u16,
        /// How often before the next step comes.
        times: u32,
    },
    /// Cuts the connection in the middle of an answer.
    Break {
        /// How often before the next step comes.
        times: u32,
    },
    /// Reports a failed response.
    Fail {
        /// The error code.
        code: String,
        /// What is said about it.
        message: String,
    },
    /// Reports an incomplete response.
    Incomplete {
        /// Why.
        reason: String,
    },
    /// Never goes on.
    Hang,
    /// Dies.
    Crash,
}

/// A text answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Say {
    /// The text.
    pub text: String,
    /// In how many pieces it is streamed.
    pub deltas: usize,
    /// Pause before each piece.
    pub delay: Duration,
    /// A reasoning summary before it.
    pub reasoning: Option<String>,
    /// Input and output tokens.
    pub usage: (u64, u64),
}

impl Say {
    /// This text in the usual number of pieces.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), deltas: 3, delay: Duration::ZERO, reasoning: None, usage: (100, 20) }
    }

    /// The pieces, cut between characters; together they are the text.
    pub fn pieces(&self) -> Vec<String> {
        let chars: Vec<char> = self.text.chars().collect();
        let size = chars.len().div_ceil(self.deltas.max(1)).max(1);
        chars.chunks(size).map(|piece| piece.iter().collect()).collect()
    }
}

/// Everything a prompt asks for, in order; never empty.
pub fn script(prompt: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for line in prompt.lines() {
        for text in line.split(MARK).skip(1) {
            let words = words(text);
            if let Some(step) = step(&words) {
                let calls = matches!(step, Step::Run { .. } | Step::Patch { .. });
                steps.push(step);
                if calls && let Some(then) = value(&words, "then") {
                    steps.push(Step::Say(say(&words, then)));
                }
            }
        }
    }
    if steps.is_empty() {
        steps.push(Step::Say(Say::new(format!("echo: {prompt}"))));
    }
    steps
}

fn step(words: &[(String, String)]) -> Option<Step> {
    let times = || value(words, "times").and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
    let (name, first) = words.iter().find(|(name, _)| {
        matches!(name.as_str(), "say" | "run" | "patch" | "http" | "break" | "fail" | "incomplete" | "hang" | "crash")
    })?;
    Some(match name.as_str() {
        "say" => Step::Say(say(words, first)),
        "run" => Step::Run {
            command: first.clone(),
            escalate: value(words, "escalate") == Some("true"),
            workdir: value(words, "workdir").map(str::to_owned),
        },
        "patch" => Step::Patch { file: first.clone(), text: value(words, "text").unwrap_or("patched").to_owned() },
        "http" => Step::Http { status: first.parse().unwrap_or(500), times: times() },
        "break" => Step::Break { times: times() },
        "fail" => Step::Fail {
            code: first.clone(),
            message: value(words, "message").unwrap_or("the mock was told to fail").to_owned(),
        },
        "incomplete" => Step::Incomplete { reason: first.clone() },
        "hang" => Step::Hang,
        _ => Step::Crash,
    })
}

fn say(words: &[(String, String)], text: &str) -> Say {
    let mut say = Say::new(text);
    if let Some(deltas) = value(words, "deltas").and_then(|n| n.parse().ok()) {
        say.deltas = deltas;
    }
    if let Some(delay) = value(words, "delay").and_then(duration) {
        say.delay = delay;
    }
    say.reasoning = value(words, "reasoning").map(str::to_owned);
    if let Some((input, output)) = value(words, "usage").and_then(|pair| pair.split_once(',')) {
        say.usage = (input.parse().unwrap_or(0), output.parse().unwrap_or(0));
    }
    say
}

fn duration(text: &str) -> Option<Duration> {
    if let Some(millis) = text.strip_suffix("ms") {
        return millis.parse().ok().map(Duration::from_millis);
    }
    text.trim_end_matches('s').parse().ok().map(Duration::from_secs)
}

fn value<'a>(words: &'a [(String, String)], name: &str) -> Option<&'a str> {
    words.iter().find(|(word, _)| word == name).map(|(_, value)| value.as_str())
}

/// Splits at spaces outside quotes; a quote counts only where a value begins.
fn words(text: &str) -> Vec<(String, String)> {
    let mut rest = text.trim_start();
    let mut words = Vec::new();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let (value, after) = match after.strip_prefix('=') {
            None => ("", after),
            Some(after) => match after.chars().next() {
                Some(quote @ ('"' | '\'')) => after[1..].split_once(quote).unwrap_or((&after[1..], "")),
                _ => after.split_at(after.find(char::is_whitespace).unwrap_or(after.len())),
            },
        };
        words.push((name.to_owned(), value.to_owned()));
        rest = after.trim_start();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_a_script() {
        let steps =
            script("hello\n@mock run='echo \"a b\" > x' escalate=true then=\"it is {output}\" @mock http=429 times=2");
        assert_eq!(
            steps,
            [
                Step::Run { command: "echo \"a b\" > x".into(), escalate: true, workdir: None },
                Step::Say(Say::new("it is {output}")),
                Step::Http { status: 429, times: 2 },
            ]
        );
        assert_eq!(script("plain"), [Step::Say(Say::new("echo: plain"))]);
        let Step::Say(say) = &script("@mock say='grüße' deltas=2 delay=5ms")[0] else { panic!("not a text") };
        assert_eq!(say.pieces(), ["grü", "ße"]);
        assert_eq!(say.delay, Duration::from_millis(5));
    }
}
