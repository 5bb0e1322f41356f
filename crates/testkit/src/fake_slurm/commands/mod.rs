//! The commands, one module each: what a command line does to the cluster and what it prints.

pub(crate) mod sacct;
pub(crate) mod sbatch;
pub(crate) mod scancel;
pub(crate) mod scontrol;
mod show;
pub(crate) mod sinfo;
pub(crate) mod squeue;

use super::model::{Cluster, Moment};
use super::settings::{Dialect, Settings};
use super::store::Dir;

/// What a command works on.
pub(crate) struct Context<'a> {
    pub(crate) dir: &'a Dir,
    pub(crate) cluster: &'a mut Cluster,
    pub(crate) settings: &'a Settings,
    pub(crate) now: Moment,
}

impl Context<'_> {
    fn dialect(&self) -> Dialect {
        self.settings.dialect
    }

    fn version(&self) -> super::answer::Answer {
        super::answer::Answer::says(format!("{}\n", self.dialect().version_line()))
    }
}

/// Job ids of a list. The second is what is none.
fn ids<'a>(items: impl IntoIterator<Item = &'a str>) -> Result<Vec<u32>, String> {
    items.into_iter().map(|item| item.parse::<u32>().map_err(|_| item.to_owned())).collect()
}
