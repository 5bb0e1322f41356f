//! `drover audit`: who changed what, and who wanted to, from the files that the router and the dispatcher write.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::app::App;
use crate::args::Audit;
use crate::fault::{Exit, Fault};
use crate::render::colour::Tone;
use crate::render::table::{Cell, Table};
use crate::render::words;

/// Whose logs there are: the router's, and the dispatcher's.
const LOGS: [&str; 2] = ["audit", "dispatch"];
/// What stands for an answer that was never written down.
const UNKNOWN: &str = "unknown";

pub(super) fn run(app: &App, args: &Audit) -> anyhow::Result<Exit> {
    if app.global.router.is_some() {
        return Err(Fault::usage(
            "the audit log is a file of the router's state directory, and nobody is told it over the network",
        )
        .hint("leave out --router, and run the command where the router runs")
        .into());
    }
    let dir = app.state()?.path().join("audit");
    let most = if args.all { usize::MAX } else { args.last };
    let wanted = |row: &Row| {
        args.user.is_none_or(|uid| row.uid == u64::from(uid))
            && args.swarm.as_deref().is_none_or(|swarm| row.swarm.starts_with(swarm))
    };
    let cannot = |error: io::Error| Fault::failed(format!("cannot read the audit log in {}: {error}", dir.display()));
    let mut rows = Vec::new();
    for name in LOGS {
        let mut kept = Kept { most, rows: VecDeque::new(), first: 0, open: BTreeMap::new() };
        for file in files(&dir, name).map_err(cannot)? {
            for line in BufReader::new(file).split(b'\n') {
                // What is no line of ours is what a killed writer left.
                if let Ok(Value::Object(line)) = serde_json::from_slice(&line.map_err(cannot)?) {
                    kept.take(line);
                }
            }
        }
        rows.extend(kept.rows.into_iter().filter(wanted));
    }
    // Each log is in order; a time is written with all its digits.
    rows.sort_by(|a, b| a.at().cmp(b.at()));
    let rows = &rows[rows.len().saturating_sub(most)..];
    if app.global.json {
        for row in rows {
            app.screen.out(&Value::Object(row.line.clone()).to_string())?;
        }
        return Ok(Exit::Done);
    }
    app.screen.table(&table(rows))?;
    if rows.is_empty() {
        app.screen.note("nothing was changed yet, or by nobody whom you ask for");
    }
    Ok(Exit::Done)
}

/// The files, oldest first. The current one is opened first: a file that gets its number meanwhile is read once.
fn files(dir: &Path, log: &str) -> io::Result<Vec<File>> {
    let current = match File::open(dir.join(format!("{log}.jsonl"))) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let mut numbered: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let is_full = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(log)?.strip_prefix('-')?.strip_suffix(".jsonl"))
            .is_some()
    };
    numbered.retain(is_full);
    numbered.sort();
    let mut files = numbered.into_iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    let number = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
    files.extend(current.filter(|current| files.iter().all(|file| number(file) != number(current))));
    Ok(files)
}

/// One command.
#[derive(Debug)]
struct Row {
    uid: u64,
    swarm: String,
    /// Both lines in one.
    line: Map<String, Value>,
}

impl Row {
    fn at(&self) -> &str {
        self.line.get("at").and_then(Value::as_str).unwrap_or_default()
    }
}

/// The commands, each with its answer.
struct Kept {
    most: usize,
    rows: VecDeque<Row>,
    /// Number of the first row among all.
    first: usize,
    /// Commands without an answer, by id: numbers among all.
    open: BTreeMap<String, usize>,
}

impl Kept {
    /// Many more than are wanted may be none of those that are asked for.
    const AT_LEAST: usize = 100_000;

    fn take(&mut self, mut line: Map<String, Value>) {
        let Some(id) = line.get("id").and_then(Value::as_str).map(str::to_owned) else { return };
        if line.contains_key("command") {
            let swarm = swarm_of(&line, "asked");
            let uid = line.get("uid").and_then(Value::as_u64).unwrap_or(u64::MAX);
            // What was refused has its answer in the same line.
            if !line.contains_key("result") {
                line.insert("result".to_owned(), UNKNOWN.into());
                self.open.insert(id, self.first + self.rows.len());
            }
            self.rows.push_back(Row { uid, swarm, line });
            if self.rows.len() > self.most.max(Self::AT_LEAST) {
                self.rows.pop_front();
                self.first += 1;
            }
            return;
        }
        let row = self.open.remove(&id).and_then(|number| self.rows.get_mut(number.checked_sub(self.first)?));
        let Some(row) = row else { return };
        let told = swarm_of(&line, "told");
        if !told.is_empty() {
            row.swarm = told;
        }
        for (name, as_name) in [("result", "result"), ("told", "told"), ("at", "answered_at")] {
            if let Some(value) = line.remove(name) {
                row.line.insert(as_name.to_owned(), value);
            }
        }
    }
}

fn swarm_of(line: &Map<String, Value>, part: &str) -> String {
    line.get(part).and_then(|part| part.get("swarm_id")).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(&["WHEN (UTC)", "USER", "BY", "COMMAND", "RESULT", "SWARM", "WHAT"]);
    for row in rows {
        let text = |name: &str| row.line.get(name).and_then(Value::as_str).unwrap_or_default();
        let result = text("result");
        let tone = match result {
            "ok" => Tone::Good,
            UNKNOWN => Tone::Warn,
            _ => Tone::Bad,
        };
        table.row(vec![
            text("at").get(..19).unwrap_or_default().replace('T', " ").into(),
            row.uid.to_string().into(),
            text("door").to_owned().into(),
            text("command").to_owned().into(),
            Cell::toned(result.to_owned(), tone),
            words::short(&row.swarm, 13).to_owned().into(),
            what(&row.line).into(),
        ]);
    }
    table
}

/// What was asked, without what has a column of its own.
fn what(line: &Map<String, Value>) -> String {
    let asked = line.get("asked").and_then(Value::as_object);
    let fields = asked.into_iter().flatten().filter(|(name, _)| !matches!(name.as_str(), "swarm_id" | "request_id"));
    let said = fields.map(|(name, value)| match value {
        Value::String(text) => format!("{name}={text}"),
        other => format!("{name}={other}"),
    });
    // Names are whatever their callers chose: none may move the cursor of a terminal.
    said.collect::<Vec<_>>().join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_command_and_its_answer_are_one_row_and_the_files_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let line = |value: Value| format!("{value}\n");
        let taken = |id: &str, uid: u32| {
            line(json!({"id": id, "at": "2026-01-02T03:04:05.000001Z", "command": "inject", "uid": uid, "door": "grpc",
                "asked": {"swarm_id": "0199", "nodes": [0], "call_id": "a\u{1b}[2J"}}))
        };
        let refused = line(
            json!({"id": "5", "at": "2026-01-02T03:04:07.000001Z", "command": "terminate", "uid": 9, "door": "grpc",
            "asked": {}, "refused": "role", "result": "not_allowed"}),
        );
        let ok = |id: &str| line(json!({"id": id, "at": "2026-01-02T03:04:06.000001Z", "result": "ok"}));
        fs::write(dir.path().join("audit-000001.jsonl"), taken("1", 7) + "{\"half\n" + &taken("2", 8)).unwrap();
        fs::write(dir.path().join("audit-000002.jsonl"), ok("1") + &ok("nobody's")).unwrap();
        fs::write(dir.path().join("audit.jsonl"), taken("3", 7) + &ok("3") + &refused).unwrap();
        fs::write(dir.path().join("dispatch.jsonl"), taken("4", 7)).unwrap();
        let mut kept = Kept { most: 10, rows: VecDeque::new(), first: 0, open: BTreeMap::new() };
        for file in files(dir.path(), "audit").unwrap() {
            for text in BufReader::new(file).lines() {
                if let Ok(Value::Object(fields)) = serde_json::from_str(&text.unwrap()) {
                    kept.take(fields);
                }
            }
        }
        let rows: Vec<(u64, &str)> =
            kept.rows.iter().map(|row| (row.uid, row.line["result"].as_str().unwrap())).collect();
        assert_eq!(rows, [(7, "ok"), (8, UNKNOWN), (7, "ok"), (9, "not_allowed")]);
        assert_eq!(kept.rows[0].swarm, "0199");
        assert_eq!(what(&kept.rows[0].line), "call_id=a [2J nodes=[0]");
        assert!(files(&dir.path().join("none"), "audit").unwrap().is_empty());
    }
}
