//! `squeue`.

use std::collections::BTreeMap;

use crate::slurm::core::{QueueList, Queued};
use crate::slurm::state::JobState;
use crate::slurm::tag::Tag;

/// Job id, state, reason, nodes, expected start, name, comment. Name and comment are chosen by people and come last.
pub(crate) const FORMAT: &str = "%A|%T|%r|%N|%S|%j|%k";
const FIELDS: usize = 7;
/// How the first line begins. With it an empty queue is told from an answer that was cut off, and from what a site prints first.
const HEADER: &str = "JOBID|";

/// Reads the whole queue of one user.
pub(crate) fn read(text: &str) -> QueueList {
    // A last line without an end was cut off, and may say anything.
    let ended = text.rfind('\n').map_or("", |at| &text[..=at]);
    let mut lines = ended.lines();
    let headed = lines.by_ref().any(|line| line.starts_with(HEADER));
    let mut list = QueueList { jobs: Vec::new(), whole: headed && ended.len() == text.len() };
    let mut in_free_text = false;
    let mut lines_of: BTreeMap<u64, u32> = BTreeMap::new();
    for line in lines {
        let head = line.split_once('|').map_or("", |(head, _)| head);
        let starts_a_job = !head.is_empty() && head.bytes().all(|byte| byte.is_ascii_digit());
        if starts_a_job {
            *lines_of.entry(head.parse().unwrap_or(0)).or_insert(0_u32) += 1;
            let job = job(line);
            list.whole &= job.is_some();
            in_free_text = job.is_some();
            list.jobs.extend(job);
        } else if !in_free_text && !line.trim().is_empty() {
            // Not the rest of a comment with line ends in it: something that we know nothing of.
            list.whole = false;
        }
    }
    // Of two lines for one job one was written by whoever chose a name or a comment with a line end in it. Neither is believed.
    list.whole &= lines_of.values().all(|lines| *lines == 1);
    list.jobs.retain(|job| lines_of.get(&job.id) == Some(&1));
    list
}

fn job(line: &str) -> Option<Queued> {
    let fields: Vec<&str> = line.splitn(FIELDS, '|').collect();
    let [id, state, reason, hosts, starts, name, ..] = fields[..] else { return None };
    // A name with a line end in it leaves the comment on another line. Ours have none.
    let comment = fields.get(6).copied().unwrap_or_default();
    if state.trim().is_empty() {
        return None;
    }
    Some(Queued {
        id: id.parse().ok().filter(|&id| id > 0)?,
        tag: Tag::of(name.trim(), comment.trim()),
        state: JobState::parse(state),
        reason: super::tame(reason),
        hosts: super::tame_list(hosts),
        starts: super::tame(starts),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slurm::state::Class;

    const HEAD: &str = "JOBID|STATE|REASON|NODELIST|START_TIME|NAME|COMMENT\n";

    #[test]
    fn a_queue_is_read_whatever_others_call_their_jobs() {
        let text = "12|RUNNING|None|n[1-4]|2026-11-21T12:00:00|drover-s.1|drover:s:1\n\
                    13|PD|Resources||N/A|drover-t.2|(null)\n\
                    14|RUNNING|None|n1|N/A|a|b|c|drover:x:1\n\
                    15|HIBERNATING|None|n2|N/A|evil\nname|drover:s:9\n\
                    16|CG|None|n3|N/A|$(reboot)|\n";
        let text = format!("Welcome!\n{HEAD}{text}");
        let list = read(&text);
        assert!(list.whole);
        let ours: Vec<_> = list.jobs.iter().filter_map(|job| Some((job.id, job.tag.as_ref()?.name()))).collect();
        assert_eq!(ours, [(12, "drover-s.1".to_owned()), (13, "drover-t.2".to_owned())]);
        assert_eq!((list.jobs[0].hosts.as_str(), list.jobs[1].starts.as_str()), ("n[1-4]", ""));
        assert_eq!(list.jobs[1].state.as_str(), "PENDING");
        assert_eq!(list.jobs[3].state.class(), Class::Unknown);
        assert_eq!(list.jobs.len(), 5);
        // Hosts that do not stand side by side make a long list, of which none is lost.
        let hosts: Vec<String> = (0..200).map(|n| format!("node{}", n * 3)).collect();
        let row = format!("{HEAD}12|RUNNING|\u{202e}\u{1b}[31mNone|{}|N/A|drover-s.1|\n", hosts.join(","));
        let job = &read(&row).jobs[0];
        assert_eq!((job.hosts.as_str(), job.reason.as_str()), (hosts.join(",").as_str(), "[31mNone"));
        assert_eq!(read(HEAD), QueueList { jobs: Vec::new(), whole: true });
    }

    #[test]
    fn what_is_not_understood_makes_the_list_partial_and_loses_no_other_job() {
        for noise in [
            "17|RUNNING",
            "17||None|n1|N/A|x|",
            "0|RUNNING|None|n1|N/A|x|",
            "99999999999999999999999|RUNNING|None|n1|N/A|x|",
            "slurm_load_jobs error: Unable to contact slurm controller",
        ] {
            let list = read(&format!("{HEAD}{noise}\n12|RUNNING|None|n1|N/A|drover-s.1|\n"));
            assert!(!list.whole, "{noise}");
            assert_eq!(list.jobs.last().map(|job| job.id), Some(12), "{noise}");
        }
        let all = format!("{HEAD}12|RUNNING|None|n1|N/A|drover-s.1|\n13|RUNNING|None|n1|N/A|drover-t.1|\n");
        for cut in 0..all.len() {
            let list = read(&all[..cut]);
            assert!(!list.whole || list.jobs.len() == all[..cut].lines().count() - 1, "cut off after {cut} bytes");
        }
    }
}
