//! Tasks from a file or from standard input: one prompt a line, or one JSON object a line.
//!
//! A line that cannot be read becomes a task that is refused with the reason, so that one bad line among a million costs one
//! result and not the run.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::Path;

use drover_proto::dispatch::{self as pb, dispatch_request};
use serde_json::{Map, Value};
use tokio::sync::mpsc;

use crate::fault::Fault;

/// Longest line that is read.
const LONGEST_LINE: u64 = 16 << 20;
/// Tasks, and bytes of them, in one message.
const TOGETHER: usize = 256;
const TOGETHER_BYTES: usize = 256 << 10;
/// Lines that may wait to be sent.
const AHEAD: usize = 512;

/// Where tasks come from.
pub(super) type Input = Box<dyn Read + Send>;

/// How a source is known later: a file by its whole path, standard input as `-`.
pub(super) fn name(file: &str) -> Result<String, Fault> {
    if file == "-" {
        return Ok(file.to_owned());
    }
    let path = std::path::absolute(file).map_err(|error| unreadable(file, &error))?;
    Ok(path.to_string_lossy().into_owned())
}

/// Opens a source.
pub(super) fn open(source: &str) -> Result<Input, Fault> {
    if source == "-" {
        return Ok(Box::new(io::stdin()));
    }
    let file = File::open(source).map_err(|error| unreadable(source, &error))?;
    if Path::new(source).is_dir() {
        return Err(Fault::failed(format!("{source} is a directory")).hint("name the file with the prompts in it"));
    }
    Ok(Box::new(file))
}

/// How many tasks a file has; `None` for what is no file.
pub(super) fn count(source: &str) -> Option<u64> {
    let file = File::open(source).ok()?;
    file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let mut lines = BufReader::with_capacity(1 << 20, file);
    let (mut count, mut blank) = (0, true);
    loop {
        let part = lines.fill_buf().ok()?;
        if part.is_empty() {
            return Some(count + u64::from(!blank));
        }
        for &byte in part {
            if byte == b'\n' {
                count += u64::from(!blank);
                blank = true;
            } else {
                blank &= byte.is_ascii_whitespace();
            }
        }
        let read = part.len();
        lines.consume(read);
    }
}

fn unreadable(file: &str, error: &io::Error) -> Fault {
    Fault::failed(format!("cannot read {file}: {error}"))
        .hint("a file has one prompt a line, or one JSON object a line; - is standard input")
}

/// Reads tasks and sends them, as fast as they are taken.
pub(super) async fn feed(input: Input, send: mpsc::Sender<pb::DispatchRequest>) -> Result<(), Fault> {
    let (tell, mut tasks) = mpsc::channel(AHEAD);
    // It ends when nobody takes its tasks any more, or with the program: a read of standard input cannot be broken off.
    let reading = tokio::task::spawn_blocking(move || read(input, &tell));
    let mut batch = Vec::new();
    while tasks.recv_many(&mut batch, TOGETHER).await > 0 {
        let mut part = Vec::new();
        let mut bytes = 0;
        for task in batch.drain(..) {
            let task: pb::Task = task;
            bytes += task.prompt.len() + task.system.len() + task.schema.len();
            part.push(task);
            if bytes >= TOGETHER_BYTES {
                if send.send(request(std::mem::take(&mut part))).await.is_err() {
                    return Ok(());
                }
                bytes = 0;
            }
        }
        if !part.is_empty() && send.send(request(part)).await.is_err() {
            // The dispatcher has ended the run; it says why itself.
            return Ok(());
        }
    }
    match reading.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Fault::failed(format!("cannot read the tasks to their end: {error}"))),
        Err(_) => Err(Fault::failed("reading the tasks failed")),
    }
}

fn request(tasks: Vec<pb::Task>) -> pb::DispatchRequest {
    pb::DispatchRequest { request: Some(dispatch_request::Request::Tasks(pb::TaskBatch { tasks })) }
}

/// Reads to the end, or until nobody wants more.
fn read(input: impl Read, tell: &mpsc::Sender<pb::Task>) -> io::Result<()> {
    let mut lines = BufReader::with_capacity(64 << 10, input);
    let (mut line, mut number) = (Vec::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        if lines.by_ref().take(LONGEST_LINE + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let task = if line.len() as u64 > LONGEST_LINE {
            skip_line(&mut lines, &line)?;
            Some(refused(number, "is longer than 16 MiB"))
        } else {
            task_of(&line, number)
        };
        if let Some(task) = task
            && tell.blocking_send(task).is_err()
        {
            return Ok(());
        }
    }
}

fn skip_line(lines: &mut impl io::BufRead, begun: &[u8]) -> io::Result<()> {
    if begun.last() == Some(&b'\n') {
        return Ok(());
    }
    loop {
        let part = lines.fill_buf()?;
        let end = part.iter().position(|&byte| byte == b'\n');
        let (used, over) = (end.map_or(part.len(), |end| end + 1), end.is_some() || part.is_empty());
        lines.consume(used);
        if over {
            return Ok(());
        }
    }
}

fn refused(number: u64, why: &str) -> pb::Task {
    pb::Task { unreadable: format!("line {number} {why}"), ..pb::Task::default() }
}

/// The task of a line; none of a blank one.
fn task_of(line: &[u8], number: u64) -> Option<pb::Task> {
    let Ok(text) = std::str::from_utf8(line) else { return Some(refused(number, "is not UTF-8 text")) };
    let text = text.trim_end_matches(['\n', '\r']);
    if text.trim().is_empty() {
        return None;
    }
    if !text.trim_start().starts_with('{') {
        return Some(pb::Task { prompt: text.to_owned(), ..pb::Task::default() });
    }
    let task = match serde_json::from_str::<Map<String, Value>>(text) {
        Ok(object) => object_task(object),
        Err(error) => Err(format!("begins with a brace and is no JSON object: {error}")),
    };
    Some(task.unwrap_or_else(|why| refused(number, &why)))
}

fn object_task(mut object: Map<String, Value>) -> Result<pb::Task, String> {
    let mut text = |key: &str| match object.remove(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Number(number)) if key == "id" => Ok(number.to_string()),
        Some(_) => Err(format!("has a {key} that is no text")),
    };
    let mut task = pb::Task {
        id: text("id")?,
        prompt: text("prompt")?,
        system: text("system")?,
        kind: text("kind")?,
        url: text("url")?,
        priority: text("priority")?,
        ..pb::Task::default()
    };
    let number = |value: Option<Value>, key: &str| match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_u64().map(Some).ok_or_else(|| format!("has a {key} that is no whole number")),
    };
    let most = number(object.remove("max_tokens"), "max_tokens")?.unwrap_or(0);
    task.max_tokens = u32::try_from(most).map_err(|_| "has a max_tokens that no model takes".to_owned())?;
    task.deadline_ms = number(object.remove("deadline_ms"), "deadline_ms")?.unwrap_or(0);
    task.temperature = match object.remove("temperature") {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_f64().ok_or("has a temperature that is no number")?),
    };
    task.schema = match object.remove("schema") {
        None | Some(Value::Null) => String::new(),
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => schema.to_string(),
        Some(_) => return Err("has a schema that is no JSON Schema".to_owned()),
    };
    let mut off = |key: &str| match object.remove(key) {
        None | Some(Value::Null | Value::Bool(true)) => Ok(false),
        Some(Value::Bool(false)) => Ok(true),
        Some(_) => Err(format!("has a {key} that is neither true nor false")),
    };
    task.no_hedge = off("hedge")?;
    task.no_cache = off("cache")?;
    if task.prompt.is_empty() && task.url.is_empty() {
        return Err("has no prompt".to_owned());
    }
    // Further fields are the user's own: data sets carry much that is not for a model.
    Ok(task)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Vec<pb::Task> {
        let (tell, mut tasks) = mpsc::channel(100);
        read(text, &tell).unwrap();
        drop(tell);
        std::iter::from_fn(|| tasks.try_recv().ok()).collect()
    }

    #[test]
    fn a_line_is_a_prompt_or_an_object_and_a_bad_one_costs_only_itself() {
        let tasks = all(b"Say hi\r\n\n  \n{\"id\": 7, \"prompt\": \"p\", \"kind\": \"extract\", \"max_tokens\": 9, \
            \"temperature\": 0.5, \"schema\": {\"type\": \"object\"}, \"hedge\": false, \"extra\": [1]}\n\
            {\"prompt\": 5}\n{not json\n\xff\xfe\n{\"id\": \"x\"}\nlast");
        assert_eq!(tasks.len(), 7);
        assert_eq!(tasks[0].prompt, "Say hi");
        let object = &tasks[1];
        assert_eq!((object.id.as_str(), object.kind.as_str(), object.max_tokens), ("7", "extract", 9));
        assert_eq!((object.temperature, object.no_hedge), (Some(0.5), true));
        assert_eq!(object.schema, r#"{"type":"object"}"#);
        let why: Vec<&str> = tasks[2..6].iter().map(|task| task.unreadable.as_str()).collect();
        assert_eq!(why[0], "line 5 has a prompt that is no text");
        assert!(why[1].starts_with("line 6 begins with a brace and is no JSON object"), "{why:?}");
        assert_eq!((why[2], why[3]), ("line 7 is not UTF-8 text", "line 8 has no prompt"));
        assert_eq!((tasks[6].prompt.as_str(), tasks[6].unreadable.as_str()), ("last", ""));
    }

    #[test]
    fn lines_that_are_blank_are_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts");
        std::fs::write(&path, "a\n\n \t\nb\nc").unwrap();
        assert_eq!(count(path.to_str().unwrap()), Some(3));
        assert_eq!(count("-"), None);
    }

    #[tokio::test]
    async fn tasks_are_read_only_as_fast_as_they_are_taken() {
        struct Counting(std::sync::Arc<std::sync::atomic::AtomicUsize>);
        impl Read for Counting {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let text = b"one prompt of many\n".repeat(buffer.len() / 19);
                buffer[..text.len()].copy_from_slice(&text);
                Ok(text.len())
            }
        }
        let reads = std::sync::Arc::default();
        let (send, mut sent) = mpsc::channel(2);
        let feeding = feed(Box::new(Counting(std::sync::Arc::clone(&reads))), send);
        let taking = async {
            for _ in 0..10 {
                sent.recv().await.unwrap();
            }
            sent.close();
        };
        let (fed, ()) = tokio::join!(feeding, taking);
        fed.unwrap();
        // An endless input, and yet only as much was read as was taken and may wait.
        assert!(reads.load(std::sync::atomic::Ordering::SeqCst) < 10, "{reads:?}");
    }
}
