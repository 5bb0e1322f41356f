//! `sinfo`

use super::Context;
use super::squeue::line;
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::Partition;
use crate::fake_slurm::options::{Opt, flag, parse, with};
use crate::fake_slurm::scheduler::node_state;
use crate::fake_slurm::text;

const OPTIONS: &[Opt] = &[
    with("format", Some('o')),
    with("nodes", Some('n')),
    with("partition", Some('p')),
    with("states", Some('t')),
    flag("Node", Some('N')),
    flag("all", Some('a')),
    flag("exact", Some('e')),
    flag("noheader", Some('h')),
    flag("version", Some('V')),
];

const DEFAULT: &str = "%9P %.5a %.10l %.6D %.6t %N";

/// Several nodes that are alike in everything that is printed.
struct Group<'a> {
    partition: &'a Partition,
    nodes: Vec<String>,
    states: Vec<String>,
}

pub(crate) fn run(on: &Context<'_>, args: &[String]) -> Answer {
    let asked = match parse("sinfo", OPTIONS, args, true) {
        Ok(asked) => asked,
        Err(error) => return Answer::usage("sinfo", &error),
    };
    if asked.has("version") {
        return on.version();
    }
    let pieces = text::pieces(asked.get("format").unwrap_or(DEFAULT));
    let (partitions, names, states) = (asked.list("partition"), asked.list("nodes"), asked.list("states"));
    let mut groups: Vec<(String, Group<'_>)> = Vec::new();
    for partition in &on.cluster.partitions {
        if partitions.as_ref().is_some_and(|chosen| !chosen.contains(&partition.name)) {
            continue;
        }
        for name in &partition.nodes {
            let state = node_state(on.cluster, name, on.settings, on.now);
            let short = short(&state);
            let bare = |text: &str| text.trim_end_matches('*').to_owned();
            if names.as_ref().is_some_and(|names| !names.contains(name))
                || states.as_ref().is_some_and(|chosen| {
                    !chosen.iter().any(|one| *one == bare(&state) || *one == bare(&short) || *one == short)
                })
            {
                continue;
            }
            let one = Group { partition, nodes: vec![name.clone()], states: vec![state] };
            // Alike is what does not differ in the columns that are no sums.
            let key = pieces_key(on, &pieces, &one);
            match groups.iter_mut().find(|(known, group)| *known == key && group.partition.name == partition.name) {
                Some((_, group)) if !asked.has("Node") => {
                    group.nodes.extend(one.nodes);
                    group.states.extend(one.states);
                }
                _ => groups.push((key, one)),
            }
        }
    }
    if asked.has("Node") {
        groups.sort_by(|(_, one), (_, other)| one.nodes.cmp(&other.nodes));
    }
    let mut out = String::new();
    if !asked.has("noheader") {
        match line(&pieces, |letter| header(letter).map(str::to_owned)) {
            Ok(header) => out.push_str(&header),
            Err(letter) => return unknown(letter),
        }
    }
    for (_, group) in &groups {
        match line(&pieces, |letter| field(on, group, letter)) {
            Ok(line) => out.push_str(&line),
            Err(letter) => return unknown(letter),
        }
    }
    Answer::says(out)
}

fn unknown(letter: char) -> Answer {
    Answer::fail(1, format!("sinfo: error: Invalid node format specification: {letter}\n"))
}

fn pieces_key(on: &Context<'_>, pieces: &[text::Piece], one: &Group<'_>) -> String {
    let parts = pieces.iter().filter_map(|piece| match piece {
        text::Piece::Field { letter, .. } if !"DNnACF".contains(*letter) => field(on, one, *letter),
        _ => None,
    });
    parts.collect::<Vec<_>>().join("\u{1f}")
}

fn header(letter: char) -> Option<&'static str> {
    Some(match letter {
        'a' => "AVAIL",
        'A' => "NODES(A/I)",
        'c' => "CPUS",
        'C' => "CPUS(A/I/O/T)",
        'D' => "NODES",
        'E' => "REASON",
        'f' => "AVAIL_FEATURES",
        'F' => "NODES(A/I/O/T)",
        'G' => "GRES",
        'l' => "TIMELIMIT",
        'L' => "DEFAULTTIME",
        'm' => "MEMORY",
        'n' => "HOSTNAMES",
        'N' => "NODELIST",
        'P' | 'R' => "PARTITION",
        't' | 'T' => "STATE",
        _ => return None,
    })
}

fn field(on: &Context<'_>, group: &Group<'_>, letter: char) -> Option<String> {
    let partition = group.partition;
    let state = group.states.first().map(String::as_str).unwrap_or_default();
    let limit = |seconds: Option<u64>| seconds.map_or_else(|| "infinite".to_owned(), text::span);
    let count = |wanted: fn(&str) -> bool| group.states.iter().filter(|state| wanted(state)).count();
    let busy = count(|state| ["allocated", "completing", "draining"].contains(&state.trim_end_matches('*')));
    let idle = count(|state| state == "idle");
    let all = group.states.len();
    Some(match letter {
        'a' => if partition.up { "up" } else { "down" }.to_owned(),
        'A' => format!("{busy}/{idle}"),
        'c' => "8".to_owned(),
        'C' => format!("{}/{}/{}/{}", busy * 8, idle * 8, (all - busy - idle) * 8, all * 8),
        'D' => all.to_string(),
        'E' => reason(on, group),
        'f' => "(null)".to_owned(),
        'F' => format!("{busy}/{idle}/{}/{all}", all - busy - idle),
        'G' => "gpu:8".to_owned(),
        'l' => limit(partition.max_seconds),
        'L' => limit(partition.default_seconds),
        'm' => "16000".to_owned(),
        'n' | 'N' => text::compress(&group.nodes),
        'P' if partition.default => format!("{}*", partition.name),
        'P' | 'R' => partition.name.clone(),
        't' => short(state),
        'T' => state.to_owned(),
        _ => return None,
    })
}

fn reason(on: &Context<'_>, group: &Group<'_>) -> String {
    let node = group.nodes.first().and_then(|name| on.cluster.node(name));
    match node {
        Some(node) if node.down => "Not responding".to_owned(),
        Some(node) => node.admin.as_ref().map_or_else(|| "none".to_owned(), |(_, why)| why.clone()),
        None => "none".to_owned(),
    }
}

fn short(state: &str) -> String {
    let (bare, mark) = state.strip_suffix('*').map_or((state, ""), |bare| (bare, "*"));
    let short = match bare {
        "allocated" => "alloc",
        "completing" => "comp",
        "draining" => "drng",
        "drained" => "drain",
        other => other,
    };
    format!("{short}{mark}")
}
