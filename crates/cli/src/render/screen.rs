//! Standard output for what was asked, standard error for everything else, and live lanes that neither tears apart.

use std::io::{self, IsTerminal as _, Write as _};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::render::colour::{Paint, Tone};
use crate::render::table::{self, Table};
use crate::render::transcript::{Kind, Line};

/// Where a command prints. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Screen {
    multi: MultiProgress,
    out: Paint,
    err: Paint,
    live: bool,
}

impl Screen {
    /// Live lines are drawn on standard error when it is a terminal and people, not scripts, are to read.
    pub(crate) fn new(json: bool) -> Self {
        let live = !json && io::stderr().is_terminal();
        let target = if live { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            multi: MultiProgress::with_draw_target(target),
            out: Paint::of(&io::stdout()),
            err: Paint::of(&io::stderr()),
            live,
        }
    }

    /// Whether live lines are drawn.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Colours of standard output.
    pub(crate) fn paint(&self) -> Paint {
        self.out
    }

    /// A line of the answer.
    pub(crate) fn out(&self, text: &str) -> io::Result<()> {
        self.multi.suspend(|| writeln!(io::stdout(), "{text}"))
    }

    /// A part of the answer, as it is.
    pub(crate) fn text(&self, text: &str) -> io::Result<()> {
        self.multi.suspend(|| {
            let mut out = io::stdout();
            out.write_all(text.as_bytes())?;
            out.flush()
        })
    }

    /// A table of the answer.
    pub(crate) fn table(&self, table: &Table) -> io::Result<()> {
        let text = table.render(table::width(), self.out);
        self.multi.suspend(|| io::stdout().write_all(text.as_bytes()))
    }

    /// A word to the person, also when standard error goes to a file. It must not fail a command.
    pub(crate) fn note(&self, text: &str) {
        let text = self.err.paint(Tone::Dim, &table::tame(text));
        self.multi.suspend(|| {
            let _ = writeln!(io::stderr(), "{text}");
        });
    }

    /// Progress: only on a terminal.
    pub(crate) fn progress(&self, text: &str) {
        if self.live {
            self.note(text);
        }
    }

    /// Something went wrong.
    pub(crate) fn complain(&self, text: &str, hint: &str) {
        // What others have said is passed on, and what a terminal would make of it is not.
        let mut message = format!("{} {}\n", self.err.paint(Tone::Bad, "error:"), table::tame(text));
        if !hint.is_empty() {
            message.extend([&self.err.paint(Tone::Busy, "hint:"), " ", &table::tame(hint), "\n"]);
        }
        self.raw_error(&message);
    }

    /// Text for standard error as it is.
    pub(crate) fn raw_error(&self, text: &str) {
        self.multi.suspend(|| {
            let _ = io::stderr().write_all(text.as_bytes());
        });
    }

    /// A line about a node.
    pub(crate) fn line(&self, line: &Line) -> io::Result<()> {
        let who = line.node.map_or_else(|| "swarm".to_owned(), |node| format!("node {node}"));
        let text = match line.kind {
            Kind::Answer => line.text.clone(),
            Kind::Remark(tone) => self.out.paint(tone, &format!("[{}]", line.text)),
        };
        self.out(&format!("{} {text}", self.out.paint(Tone::Dim, &format!("{who} |"))))
    }

    /// A spinner with a text, for as long as the value lives.
    pub(crate) fn spinner(&self, text: &str) -> Live {
        let bar = self.multi.add(ProgressBar::new_spinner().with_style(style("{spinner} {wide_msg}")));
        bar.set_message(text.to_owned());
        Live::over(bar, self.live)
    }

    /// A bar that fills, for as long as the value lives.
    pub(crate) fn bar(&self, length: u64, what: &'static str) -> Live {
        let bar =
            self.multi.add(ProgressBar::new(length).with_style(style("{prefix} {bar:24} {pos}/{len}  {wide_msg}")));
        bar.set_prefix(what);
        Live::over(bar, self.live)
    }

    /// A lane of its own for one node, as the `position`th live line.
    pub(crate) fn lane(&self, position: usize, prefix: String) -> Live {
        let bar = ProgressBar::new_spinner().with_style(style("{prefix} {spinner} {wide_msg}"));
        let bar = self.multi.insert(position, bar);
        bar.set_prefix(prefix);
        // It turns while its node thinks: a line that stands still looks dead.
        Live::over(bar, self.live)
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a wrong one would show as the plain default.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
        .progress_chars("━━ ")
        .tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏·")
}

/// A live line; it disappears when it is dropped.
#[derive(Debug)]
pub(crate) struct Live {
    bar: ProgressBar,
}

impl Live {
    fn over(bar: ProgressBar, ticking: bool) -> Self {
        if ticking {
            bar.enable_steady_tick(std::time::Duration::from_millis(100));
        }
        Self { bar }
    }

    pub(crate) fn say(&self, text: &str) {
        self.bar.set_message(text.to_owned());
    }

    /// Says anew whose line it is.
    pub(crate) fn head(&self, text: &str) {
        self.bar.set_prefix(text.to_owned());
    }

    /// How much all of it is.
    pub(crate) fn all(&self, length: u64) {
        self.bar.set_length(length);
    }

    pub(crate) fn at(&self, position: u64) {
        self.bar.set_position(position);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
