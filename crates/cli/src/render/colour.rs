//! Colour, only on a terminal and never against `NO_COLOR`.

use std::io::IsTerminal;

/// What a colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Busy,
    Warn,
    Bad,
    Dim,
    Bold,
}

/// Whether and how to colour one stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    on: bool,
}

impl Paint {
    /// Never colours.
    #[cfg(test)]
    pub(crate) const OFF: Self = Self { on: false };

    /// Colours a stream that is a terminal, unless the user asked for none (<https://no-color.org>).
    pub(crate) fn of(stream: &impl IsTerminal) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { on: !unwanted && stream.is_terminal() }
    }

    /// The text in its tone.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_owned(),
            _ if !self.on || text.is_empty() => return text.to_owned(),
            Tone::Good => "32",
            Tone::Busy => "36",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
            Tone::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// The tone of a state of a swarm, a node or an injection.
pub(crate) fn of_state(state: &str) -> Tone {
    match state {
        "running" | "idle" | "completed" | "ok" | "alive" | "active" => Tone::Good,
        "busy" | "launching" | "starting" | "pending" | "started" | "transferring" => Tone::Busy,
        "degraded" | "restarting" | "terminating" | "suspect" => Tone::Warn,
        "failed" | "dead" => Tone::Bad,
        "terminated" | "exited" | "left" | "closed" | "migrated" => Tone::Dim,
        _ => Tone::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_colour_nothing_is_added() {
        assert_eq!(Paint::OFF.paint(Tone::Bad, "x"), "x");
        assert_eq!(Paint { on: true }.paint(Tone::Bad, "x"), "\x1b[31mx\x1b[0m");
        assert_eq!(Paint { on: true }.paint(Tone::Bad, ""), "");
    }
}
