//! How a job of ours is recognised in the queue, also by an allocator that has forgotten everything.
//!
//! The job's name and its comment both say which swarm it is for and which submission it came from. Sites may drop or rewrite
//! comments, so either is enough.

use std::fmt;

use drover_types::SwarmId;

const NAME: &str = "drover-";
const COMMENT: &str = "drover:";

/// Which swarm, and which of its submissions. A swarm is submitted again only when the submission before surely came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tag {
    /// The swarm.
    pub(crate) swarm: SwarmId,
    /// Counts submissions, from 1.
    pub(crate) submission: u32,
}

impl Tag {
    /// The job's name.
    pub(crate) fn name(&self) -> String {
        format!("{NAME}{}.{}", self.swarm, self.submission)
    }

    /// The job's comment.
    pub(crate) fn comment(&self) -> String {
        format!("{COMMENT}{}:{}", self.swarm, self.submission)
    }

    /// Whose job has this name and comment; none when it is not ours.
    pub(crate) fn of(name: &str, comment: &str) -> Option<Self> {
        let parts = |text: &str, prefix: &str, mark: char| {
            let (swarm, submission) = text.strip_prefix(prefix)?.rsplit_once(mark)?;
            // Only the one spelling that we write.
            let number = submission.parse::<u32>().ok().filter(|number| number.to_string() == submission)?;
            Some(Self { swarm: swarm.parse().ok()?, submission: number })
        };
        parts(comment, COMMENT, ':').or_else(|| parts(name, NAME, '.'))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_of_name_and_comment_is_enough_and_nothing_else_is_ours() {
        let tag = Tag { swarm: "a.b-1".parse().unwrap(), submission: 12 };
        assert_eq!(tag.name(), "drover-a.b-1.12");
        for (name, comment) in [
            (tag.name(), tag.comment()),
            (tag.name(), String::new()),
            (tag.name(), "(null)".to_owned()),
            ("renamed".to_owned(), tag.comment()),
        ] {
            assert_eq!(Tag::of(&name, &comment).as_ref(), Some(&tag), "{name} {comment}");
        }
        for foreign in ["", "drover", "drover-", "drover-x", "drover-x.", "drover-x.01", "drover-$(x).1", "xdrover-x.1"]
        {
            assert_eq!(Tag::of(foreign, ""), None, "{foreign}");
            assert_eq!(Tag::of("", &foreign.replace('-', ":")), None, "{foreign}");
        }
    }
}
