//! What existing files say in other words than ours, and what they say that has no effect here. Both are tables.

use crate::tree::{Name, Node, Place, Value};

/// A word to the person who wrote the file; loading goes on.
#[derive(Debug)]
pub(crate) struct Remark {
    pub(crate) place: Place,
    pub(crate) message: String,
}

/// Older names: where, the older key, the key that means the same. `*` is any entry of a map or list.
const RENAMED: &[(&str, &str, &str)] = &[
    ("router", "graceful_terminate_timeout_seconds", "graceful_terminate_timeout"),
    ("cluster", "default_sandbox_mode", "local.default_sandbox_mode"),
    ("cluster.slurm", "login_alias", "login_host"),
    ("cluster.slurm", "default_partition", "partition"),
    ("cluster.slurm", "default_time", "time_limit"),
    ("cluster.slurm", "default_account", "account"),
    ("cluster.slurm", "default_qos", "qos"),
    ("cluster.slurm.profiles.*", "login_alias", "login_host"),
    ("cluster.slurm.profiles.*", "default_partition", "partition"),
    ("cluster.slurm.profiles.*", "default_time", "time_limit"),
    ("cluster.slurm.profiles.*", "default_account", "account"),
    ("cluster.slurm.profiles.*", "default_qos", "qos"),
    ("launch_providers.*", "cluster_config", "cluster_profile"),
];

const NO_TIMEOUT: &str = "a prompt waits until its node takes it, and `status` says where it is";
const LISTENS_FIRST: &str = "the router listens before it asks any backend";
const OWN_SSH: &str = "connections to the login host are kept by ssh itself";
const NO_CONTAINERS: &str = "workers do not run in containers";
const NO_CLAUDE: &str = "there is no claude agent";
const HEARTBEAT: &str = "a worker is recognised by its process, not by a heartbeat file";
const NO_ARCHIVE: &str = "the mailbox stays where it is";
const LAUNCH_TIMEOUTS: &str = "`router.launch_soft_timeout` and `router.launch_hard_timeout` hold for every launch";

/// Keys of existing files that have no effect: where, which (one `*` stands for any text), why.
const WITHOUT_EFFECT: &[(&str, &str, &str)] = &[
    ("router", "inject_timeout_seconds", NO_TIMEOUT),
    ("router", "ssh_max_workers", OWN_SSH),
    ("router", "heartbeat_timeout_seconds", HEARTBEAT),
    ("router", "graceful_terminate_poll_seconds", "the end of a turn is told, not polled for"),
    (
        "router",
        "local_graceful_terminate_timeout_seconds",
        "`router.graceful_terminate_timeout` holds for every backend",
    ),
    ("router", "aws_graceful_terminate_timeout_seconds", "there is no aws backend"),
    ("router", "download_archive_root", NO_ARCHIVE),
    ("router", "*startup_reconcile_timeout_seconds", LISTENS_FIRST),
    ("router", "startup_reconcile_timeout_*seconds", LISTENS_FIRST),
    ("router", "*startup_health_timeout_seconds", LISTENS_FIRST),
    ("ssh", "user", "ssh's own configuration names the user"),
    ("ssh", "controlpersist_minutes", OWN_SSH),
    ("cluster", "aws", "there is no aws backend"),
    ("cluster", "archive_root", NO_ARCHIVE),
    ("cluster", "worker_heartbeat_timeout_seconds", HEARTBEAT),
    ("cluster", "worker_startup_grace_seconds", HEARTBEAT),
    ("cluster", "default_execution_mode", NO_CONTAINERS),
    ("cluster", "*container*", NO_CONTAINERS),
    ("cluster.local", "archive_root", NO_ARCHIVE),
    ("cluster.local", "worker_heartbeat_timeout_seconds", HEARTBEAT),
    ("cluster.local", "worker_startup_grace_seconds", HEARTBEAT),
    ("cluster.local", "default_execution_mode", NO_CONTAINERS),
    ("cluster.local", "*container*", NO_CONTAINERS),
    ("cluster.local", "*claude*", NO_CLAUDE),
    ("cluster.slurm", "ssh_retry_attempts", OWN_SSH),
    ("cluster.slurm", "ssh_retry_delay_seconds", OWN_SSH),
    ("cluster.slurm", "default_execution_mode", NO_CONTAINERS),
    ("cluster.slurm", "*container*", NO_CONTAINERS),
    ("cluster.slurm", "*claude*", NO_CLAUDE),
    ("cluster.slurm", "launch_*_timeout_seconds", LAUNCH_TIMEOUTS),
    ("cluster.slurm.profiles.*", "ssh_retry_attempts", OWN_SSH),
    ("cluster.slurm.profiles.*", "ssh_retry_delay_seconds", OWN_SSH),
    ("cluster.slurm.profiles.*", "default_execution_mode", NO_CONTAINERS),
    ("cluster.slurm.profiles.*", "*container*", NO_CONTAINERS),
    ("cluster.slurm.profiles.*", "*claude*", NO_CLAUDE),
    ("cluster.slurm.profiles.*", "launch_*_timeout_seconds", LAUNCH_TIMEOUTS),
    ("launch_providers.*", "launch_panels", "launch forms show `launch_fields`"),
    ("launch_providers.*", "launch_*_timeout_seconds", LAUNCH_TIMEOUTS),
    ("node_scaling", "routing", "whoever asks decides what is dispatched, and whose model answers"),
    ("node_scaling", "web_search", "`node_scaling.search` names who searches"),
];

/// Brings an existing file into our shape and says what of it has no effect.
pub(crate) fn modernise(root: &mut Node) -> Vec<Remark> {
    let mut remarks = Vec::new();
    list_of_providers(root);
    for (parent, old, new) in RENAMED {
        each(root, parent, &mut |node| rename(node, old, new, &mut remarks));
    }
    for (parent, pattern, why) in WITHOUT_EFFECT {
        each(root, parent, &mut |node| {
            let Value::Map(entries) = &mut node.value else { return };
            entries.retain(|(name, _)| {
                let matches = fits(&name.text, pattern);
                if matches {
                    let (parent, key) = (parent.replace(".*", "[]"), &name.text);
                    remarks.push(Remark {
                        place: name.place.clone(),
                        message: format!("{parent}.{key} has no effect: {why}; the key can be removed"),
                    });
                }
                !matches
            });
        });
    }
    remarks.sort_by_key(|remark| match remark.place {
        Place::File { line, column } => (line, column),
        Place::Env(_) => (u64::MAX, 0),
    });
    remarks
}

/// A catalogue keyed by id becomes a list whose entries carry their id.
fn list_of_providers(root: &mut Node) {
    let Some(catalogue) = root.get_mut("launch_providers") else { return };
    let Value::Map(entries) = &mut catalogue.value else { return };
    let items = std::mem::take(entries).into_iter().map(|(name, mut node)| {
        if let Value::Map(fields) = &mut node.value
            && !fields.iter().any(|(field, _)| field.text == "id")
        {
            let id = Node { value: Value::Text(name.text.clone()), place: name.place.clone() };
            fields.insert(0, (Name { text: "id".to_owned(), place: name.place }, id));
        }
        node
    });
    catalogue.value = Value::List(items.collect());
}

fn rename(node: &mut Node, old: &str, new: &str, remarks: &mut Vec<Remark>) {
    let Some((name, value)) = node.remove(old) else { return };
    let path: Vec<&str> = new.split('.').collect();
    let taken = path.iter().try_fold(&*node, |node, key| node.get(key)).is_some_and(|node| node.value != Value::Null);
    if taken {
        remarks.push(Remark {
            place: name.place,
            message: format!("{old} has no effect: {new} says the same; the key can be removed"),
        });
    } else {
        node.set(&path, value);
    }
}

/// Calls `f` with every node at a dotted path in which `*` is any entry.
fn each(node: &mut Node, path: &str, f: &mut dyn FnMut(&mut Node)) {
    let (first, rest) = path.split_once('.').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let mut visit = |child: &mut Node| match rest {
        Some(rest) => each(child, rest, f),
        None => f(child),
    };
    match &mut node.value {
        Value::Map(entries) => {
            entries.iter_mut().filter(|(name, _)| first == "*" || name.text == first).for_each(|(_, node)| visit(node));
        }
        Value::List(items) if first == "*" => items.iter_mut().for_each(visit),
        _ => {}
    }
}

/// True when `text` is `pattern`, in which each `*` stands for any text.
fn fits(text: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_fits_whole_names_only() {
        for (text, pattern, expected) in [
            ("user", "user", true),
            ("users", "user", false),
            ("default_container_image", "*container*", true),
            ("slurm_startup_reconcile_timeout_seconds", "*startup_reconcile_timeout_seconds", true),
            ("startup_reconcile_timeout", "*startup_reconcile_timeout_seconds", false),
            ("launch_soft_timeout_seconds", "launch_*_timeout_seconds", true),
        ] {
            assert_eq!(fits(text, pattern), expected, "{text} {pattern}");
        }
    }
}
