//! What to do about an assignment. No clock, files or tasks in here.

use drover_types::{JobId, NodeIndex, SwarmId};

use super::assignment::{Assigned, Document, Release};

/// Which node of which launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    swarm: SwarmId,
    node: NodeIndex,
    job: JobId,
}

impl Task {
    pub(crate) fn of(assigned: &Assigned) -> Self {
        Self { swarm: assigned.swarm_id.clone(), node: assigned.node_id, job: assigned.job_id.clone() }
    }
}

/// Where this host's worker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mine {
    /// It has no node.
    Nothing,
    /// It serves this one, and was perhaps told to end it: with what force.
    Serving { task: Task, told: Option<Release> },
    /// It has ended this one for good.
    Done(Task),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing.
    Stay,
    /// Take this node.
    Begin(Assigned),
    /// End the node.
    End(Release),
}

/// Compares what is with what is asked for. `None` is a file that is missing or says nothing usable: what was known stays.
pub(crate) fn decide(mine: &Mine, asked: Option<&Document>) -> Step {
    let Some(document) = asked else { return Step::Stay };
    let assigned = document.assignment.as_ref();
    match mine {
        Mine::Serving { task, told } => {
            let wanted = match assigned {
                Some(assigned) if Task::of(assigned) == *task => assigned.release,
                // The host was given away: whatever still runs here had its time.
                _ => Some(Release { force: true }),
            };
            match wanted {
                Some(release) if told.is_none_or(|told| release.force && !told.force) => Step::End(release),
                _ => Step::Stay,
            }
        }
        Mine::Nothing | Mine::Done(_) => match assigned {
            Some(assigned) if assigned.release.is_none() && *mine != Mine::Done(Task::of(assigned)) => {
                Step::Begin(assigned.clone())
            }
            _ => Step::Stay,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(job: &str, release: &str) -> Document {
        let assignment = match job {
            "" => "null".to_owned(),
            job => format!(r#"{{"swarm_id":"s","node_id":1,"job_id":"{job}","agent":"echo","release":{release}}}"#),
        };
        serde_json::from_str(&format!(r#"{{"v":1,"host":"h","revision":3,"assignment":{assignment}}}"#)).unwrap()
    }

    #[test]
    fn a_node_is_begun_once_and_ended_when_it_is_released_or_given_away() {
        let (a, b, none) = (document("a", "null"), document("b", "null"), document("", ""));
        let (gentle, hard) = (document("a", r#"{"force":false}"#), document("a", r#"{"force":true}"#));
        let of = |document: &Document| document.assignment.clone().unwrap();
        let serving = |told| Mine::Serving { task: Task::of(&of(&a)), told };
        let done = Mine::Done(Task::of(&of(&a)));
        let end = |force| Step::End(Release { force });
        for (mine, asked, step) in [
            (Mine::Nothing, None, Step::Stay),
            (Mine::Nothing, Some(&none), Step::Stay),
            (Mine::Nothing, Some(&a), Step::Begin(of(&a))),
            (Mine::Nothing, Some(&gentle), Step::Stay),
            (serving(None), None, Step::Stay),
            (serving(None), Some(&a), Step::Stay),
            (serving(None), Some(&gentle), end(false)),
            (serving(Some(Release { force: false })), Some(&gentle), Step::Stay),
            (serving(Some(Release { force: false })), Some(&hard), end(true)),
            (serving(Some(Release { force: true })), Some(&hard), Step::Stay),
            (serving(None), Some(&none), end(true)),
            (serving(None), Some(&b), end(true)),
            (done.clone(), Some(&a), Step::Stay),
            (done.clone(), Some(&none), Step::Stay),
            (done, Some(&b), Step::Begin(of(&b))),
        ] {
            assert_eq!(decide(&mine, asked), step, "{mine:?} {asked:?}");
        }
    }
}
