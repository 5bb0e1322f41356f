//! What becomes of each subject, phase by phase. Subjects go through their phases by themselves: none waits for another, unless a
//! phase has a barrier.

use serde::{Deserialize, Serialize};

use crate::core::{Kind, Missing, PhaseSpec};

/// More phases than these are no plan.
pub(crate) const MOST_PHASES: usize = 6;
/// The longest that a phase may ask for.
pub(crate) const LONGEST_PROMPT: usize = 1000;

/// What is done in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Look for pages.
    Search,
    /// Read the best of them that can be read.
    Fetch,
    /// Have a model take from what was found what the next phase needs.
    Extract,
    /// Have a model judge it.
    Analyze,
}

impl Step {
    /// The kind of worker that does it.
    pub fn kind(self) -> Kind {
        match self {
            Self::Search => Kind::Search,
            Self::Fetch => Kind::Fetch,
            Self::Extract => Kind::Extract,
            Self::Analyze => Kind::Analyze,
        }
    }

    /// A model is asked for it.
    pub fn thinks(self) -> bool {
        matches!(self, Self::Extract | Self::Analyze)
    }
}

/// One phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// What is done.
    pub kind: Step,
    /// What to look for, or what the model is asked; empty for what the topic says.
    #[serde(default)]
    pub prompt: String,
    /// No subject begins it before all have ended the phase before.
    #[serde(default)]
    pub barrier: bool,
}

impl Phase {
    /// Without words of its own and without a barrier.
    pub fn of(kind: Step) -> Self {
        Self { kind, prompt: String::new(), barrier: false }
    }

    pub(super) fn spec(&self) -> PhaseSpec {
        PhaseSpec {
            kind: self.kind.kind(),
            barrier: self.barrier,
            source: !self.kind.thinks(),
            // What a subject misses is its own hole: it goes on and says so.
            missing: Missing::Proceed,
        }
    }
}

/// Search, read, judge.
pub fn usual() -> Vec<Phase> {
    [Step::Search, Step::Fetch, Step::Analyze].map(Phase::of).to_vec()
}

/// Whether phases make sense together; else what is wrong with them.
pub(crate) fn check(phases: &[Phase]) -> Result<(), String> {
    if phases.is_empty() || phases.len() > MOST_PHASES {
        return Err(format!("{} phases; there are from 1 to {MOST_PHASES}", phases.len()));
    }
    if phases.iter().any(|phase| phase.prompt.chars().count() > LONGEST_PROMPT) {
        return Err(format!("the prompt of a phase is longer than {LONGEST_PROMPT} characters"));
    }
    let rank = |phase: &Phase| match phase.kind {
        Step::Search => 0,
        Step::Fetch => 1,
        Step::Extract | Step::Analyze => 2,
    };
    // One search, then one reading, then thinking.
    if !phases.windows(2).all(|pair| rank(&pair[0]) < rank(&pair[1]) || rank(&pair[1]) == 2) {
        return Err("a search comes first and once, a fetch behind it and once, then extract and analyze".to_owned());
    }
    if rank(&phases[0]) == 1 {
        return Err("a fetch needs a search before it".to_owned());
    }
    if phases.last().is_some_and(|last| !last.kind.thinks()) {
        return Err("the last phase must be extract or analyze".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_in_an_order_that_means_something() {
        use Step::{Analyze, Extract, Fetch, Search};
        let of = |steps: &[Step]| check(&steps.iter().copied().map(Phase::of).collect::<Vec<_>>());
        for good in
            [&[Search, Fetch, Analyze][..], &[Analyze], &[Search, Extract], &[Search, Fetch, Extract, Extract, Analyze]]
        {
            assert_eq!(of(good), Ok(()), "{good:?}");
        }
        for bad in [
            &[][..],
            &[Search],
            &[Search, Fetch],
            &[Fetch, Analyze],
            &[Search, Search, Analyze],
            &[Analyze, Search, Analyze],
            &[Search, Fetch, Fetch, Analyze],
            &[Analyze; 7],
        ] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check(&usual()), Ok(()));
        let wordy = Phase { prompt: "x".repeat(LONGEST_PROMPT + 1), ..Phase::of(Analyze) };
        assert!(check(&[wordy]).unwrap_err().contains("longer"));
    }
}
