//! What the core knows of a task: never its words.

use std::time::Duration;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);
    };
}

id!(
    /// A task. The shell chooses it and never uses one twice.
    TaskId,
    u64
);
id!(
    /// Who asks; shares are fair between clients. The shell chooses it.
    ClientId,
    u64
);
id!(
    /// One try of a task: one HTTP request. Later tries have greater numbers.
    AttemptId,
    u64
);
id!(
    /// Provider, key and model: an index into [`super::Settings::lanes`], or from [`super::Engine::add_lane`].
    LaneId,
    u16
);
id!(
    /// A piece of the budget that was asked for. Unique in one run of the core; the ledger adds whose it is.
    LeaseId,
    u64
);

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Asks a search engine.
    Search,
    /// Reads a page.
    Fetch,
    /// Has a model think about something.
    Analyze,
    /// Has a model pick facts out of something.
    Extract,
    /// Has a model put many results together.
    Synthesize,
}

impl Kind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Search, Self::Fetch, Self::Analyze, Self::Extract, Self::Synthesize];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Search => "search",
            Self::Fetch => "fetch",
            Self::Analyze => "analyze",
            Self::Extract => "extract",
            Self::Synthesize => "synthesize",
        }
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// What goes first among the tasks of one client. A lower one still gets a quarter of the share of the next, so none starves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Priority {
    /// Whenever there is room.
    Low,
    /// Most things.
    #[default]
    Normal,
    /// Somebody waits for it.
    High,
}

impl Priority {
    pub(super) const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    pub(super) fn weight(self) -> u32 {
        match self {
            Self::Low => 1,
            Self::Normal => 4,
            Self::High => 16,
        }
    }
}

/// A task as it is submitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSpec {
    /// Its name from now on.
    pub id: TaskId,
    /// The share of its client compared with others; the newest word counts. 0 is taken as 1.
    pub weight: u32,
    /// What goes first among the client's own.
    pub priority: Priority,
    /// What the worker does.
    pub kind: Kind,
    /// When the answer must be there, on the same clock as `now`. Unset: whenever.
    pub deadline: Option<Duration>,
    /// No provider can count more input tokens than this; money is reserved for so many.
    pub input_upper: u64,
    /// About how many input tokens it will be, for limits on tokens per minute (bytes / 4 is a fair guess).
    pub input_likely: u64,
    /// Most output tokens that the call will be allowed.
    pub max_tokens: u64,
    /// Where it may run, best first. The next is taken when one cannot take it or fails for reasons of its own.
    pub lanes: Vec<LaneId>,
    /// Running it twice does no harm, so a slow try may get a second one beside it.
    pub hedge: bool,
    /// Its words go out as they come: nothing is tried again silently after [`super::Input::FirstByte`].
    pub streaming: bool,
}

impl TaskSpec {
    /// A model call with the usual settings.
    pub fn new(id: TaskId, lanes: Vec<LaneId>) -> Self {
        Self {
            id,
            weight: 1,
            priority: Priority::default(),
            kind: Kind::Analyze,
            deadline: None,
            input_upper: 0,
            input_likely: 0,
            max_tokens: 0,
            lanes,
            hedge: true,
            streaming: false,
        }
    }
}
