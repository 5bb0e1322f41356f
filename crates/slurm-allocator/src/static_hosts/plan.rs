//! Which hosts a swarm gets.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::{ErrorCode, Failure, SwarmId};

/// Each host once, in the order of the configuration.
pub(super) fn distinct(hosts: &[String]) -> Vec<String> {
    let mut seen = BTreeSet::new();
    hosts.iter().filter(|host| seen.insert(host.as_str())).cloned().collect()
}

/// The first free hosts, in the order of the configuration.
pub(super) fn choose(hosts: &[String], busy: &BTreeMap<String, SwarmId>, count: u32) -> Result<Vec<String>, Failure> {
    let free: Vec<&String> = hosts.iter().filter(|host| !busy.contains_key(*host)).collect();
    let wanted = count as usize;
    if free.len() >= wanted {
        return Ok(free.into_iter().take(wanted).cloned().collect());
    }
    let list = |names: Vec<String>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let taken = hosts.iter().filter_map(|host| busy.get(host).map(|by| format!("{host} (swarm {by})"))).collect();
    let message = format!(
        "{count} hosts are needed and {} are free: {}; busy: {}",
        free.len(),
        list(free.into_iter().cloned().collect()),
        list(taken)
    );
    Err(Failure::new(ErrorCode::LaunchFailed, message)
        .hint("terminate a swarm, launch fewer nodes, or add hosts to cluster.hosts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hosts: &[&str]) -> Vec<String> {
        hosts.iter().map(|&host| host.to_owned()).collect()
    }

    #[test]
    fn busy_hosts_are_passed_over_and_named_when_too_few_are_left() {
        let hosts = distinct(&names(&["n3", "n1", "n3", "n2"]));
        assert_eq!(hosts, names(&["n3", "n1", "n2"]));
        let busy = BTreeMap::from([("n1".to_owned(), "other".parse().unwrap())]);
        assert_eq!(choose(&hosts, &busy, 2).unwrap(), names(&["n3", "n2"]));
        let failure = choose(&hosts, &busy, 3).unwrap_err();
        assert_eq!(failure.code, ErrorCode::LaunchFailed);
        for part in ["3 hosts are needed", "2 are free: n3, n2", "n1 (swarm other)"] {
            assert!(failure.message.contains(part), "{failure}");
        }
    }
}
