//! `sinfo`: which partitions there are, and whether a launch can run on one at all.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_types::{ErrorCode, Failure};

use crate::walltime;

/// Partition, availability, time limit, nodes, their state. One line per partition and state.
pub(crate) const FORMAT: &str = "%R|%a|%l|%D|%T";

/// So many partitions are named to whoever has chosen none of them.
const NAMED: usize = 30;

/// One partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Partition {
    pub(crate) up: bool,
    /// None: no limit, or none that we can read.
    pub(crate) limit: Option<Duration>,
    /// Nodes in each state.
    pub(crate) nodes: BTreeMap<String, u32>,
}

impl Partition {
    fn total(&self) -> u32 {
        self.nodes.values().sum()
    }

    fn idle(&self) -> u32 {
        // A mark behind the word says that the node is powered down, reserved, not answering, …
        self.nodes.get("idle").copied().unwrap_or(0)
    }
}

/// Every partition by its name; what is not understood is left out.
pub(crate) fn read(text: &str) -> BTreeMap<String, Partition> {
    let mut partitions: BTreeMap<String, Partition> = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let [name, available, limit, count, state] = fields[..] else { continue };
        let Ok(count) = count.trim().parse::<u32>() else { continue };
        let partition = partitions.entry(super::tame(name)).or_default();
        partition.up = available.trim() == "up";
        partition.limit = walltime::parse(super::given(limit)).ok().flatten();
        *partition.nodes.entry(super::tame(state)).or_default() += count;
    }
    partitions
}

/// What a launch would find: a line for people, or why it could never run. `names` may be several, with commas between them, of
/// which Slurm takes the one that is free first.
pub(crate) fn check(
    partitions: &BTreeMap<String, Partition>,
    names: &str,
    nodes: u32,
    time: Option<Duration>,
) -> Result<String, Failure> {
    if partitions.is_empty() {
        return Ok("sinfo lists no partition; Slurm itself will say whether it can run".to_owned());
    }
    let mut said = Vec::new();
    let mut trouble = Vec::new();
    for name in names.split(',') {
        match one(partitions, name, nodes, time) {
            Ok(words) => said.push(words),
            Err(failure) => trouble.push(failure),
        }
    }
    match trouble.into_iter().next() {
        // One that fits is enough.
        Some(failure) if said.is_empty() => Err(failure),
        _ => Ok(said.join("; ")),
    }
}

fn one(
    partitions: &BTreeMap<String, Partition>,
    name: &str,
    nodes: u32,
    time: Option<Duration>,
) -> Result<String, Failure> {
    let invalid = |message: String| Failure::new(ErrorCode::InvalidRequest, message);
    let Some(partition) = partitions.get(name) else {
        let known: Vec<&str> = partitions.keys().map(String::as_str).collect();
        let more = known.len().saturating_sub(NAMED);
        let and = if more > 0 { format!(" and {more} more") } else { String::new() };
        let listed = format!("{}{and}", known[..known.len().min(NAMED)].join(", "));
        return Err(invalid(format!("there is no partition {name:?}, the cluster has {listed}"))
            .hint("choose one of them with --partition"));
    };
    if !partition.up {
        return Err(invalid(format!("partition {name} is not up")).hint("choose another one with --partition"));
    }
    if nodes > partition.total() {
        return Err(invalid(format!("partition {name} has {} nodes, {nodes} were asked for", partition.total()))
            .hint("launch fewer nodes, or choose another one with --partition"));
    }
    if let Some(limit) = partition.limit {
        let longest = walltime::words(limit);
        match time {
            Some(time) if time <= limit => {}
            Some(time) => {
                let message = format!("partition {name} allows {longest}, {} was asked for", walltime::words(time));
                return Err(invalid(message).hint(format!("choose at most --time {longest}")));
            }
            None => {
                return Err(invalid(format!("partition {name} allows {longest}, no limit was asked for"))
                    .hint(format!("choose at most --time {longest}")));
            }
        }
    }
    let idle = partition.idle();
    let when = if idle >= nodes { "it can start at once" } else { "it will wait" };
    Ok(format!("partition {name}: {idle} of {} nodes are idle, {nodes} are needed: {when}", partition.total()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "mi2508x|up|1-00:00:00|3|idle\nmi2508x|up|1-00:00:00|1|allocated\nmi2508x|up|1-00:00:00|1|down*\n\
                          debug|up|30:00|2|idle\nold|down|infinite|9|idle\nodd|up|n/a|7\n";

    #[test]
    fn what_can_never_run_is_refused_with_what_could() {
        let partitions = read(ANSWER);
        let check = |names: &str, nodes, minutes: u64| {
            check(&partitions, names, nodes, (minutes > 0).then(|| Duration::from_mins(minutes)))
        };
        assert_eq!(
            check("mi2508x", 3, 10).unwrap(),
            "partition mi2508x: 3 of 5 nodes are idle, 3 are needed: it can start at once"
        );
        assert!(check("mi2508x", 5, 10).unwrap().ends_with("it will wait"));
        for (names, nodes, minutes, wanted) in [
            ("mi", 1, 10, "the cluster has debug, mi2508x, old"),
            ("mi2508x", 6, 10, "has 5 nodes, 6 were asked for"),
            ("debug", 1, 31, "allows 00:30:00, 00:31:00 was asked for"),
            ("debug", 1, 0, "no limit was asked for"),
            ("old", 1, 10, "is not up"),
        ] {
            let failure = check(names, nodes, minutes).unwrap_err();
            assert!(failure.message.contains(wanted) && !failure.hint.is_empty(), "{failure}");
        }
        assert!(check("debug,mi2508x", 1, 31).is_ok(), "one that fits is enough");
        assert!(super::check(&read("garbage\n"), "x", 1, None).is_ok(), "what cannot be read refuses nothing");
    }
}
