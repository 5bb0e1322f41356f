//! Finding the file, applying the environment, and telling a person exactly what is wrong and where.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::tree::{Node, Place, Value};
use crate::{Config, Problem, legacy, read, schema, tree};

/// The configuration that is used when there is no file.
const BUILT_IN: &str = include_str!("../../../configs/local.yaml");
/// How messages name it.
const BUILT_IN_NAME: &str = "<built-in>";
/// Nobody writes a configuration this long; a device or a log given by mistake is.
const MAX_BYTES: u64 = 4 << 20;
/// Further ones are told when these are mended.
const MOST_FAULTS: usize = 32;
/// Environment variables with this and a double underscore set keys.
const PREFIX: &str = "DROVER_";

/// What the search for a configuration depends on.
#[derive(Debug, Clone)]
pub struct Env {
    /// Environment variables.
    pub vars: BTreeMap<String, String>,
    /// The current directory.
    pub cwd: PathBuf,
    /// Directory of system-wide configuration, `/etc`.
    pub system: PathBuf,
    /// The user.
    pub uid: u32,
}

impl Env {
    /// That of this process. Variables that are no Unicode cannot be ours and are left out.
    pub fn of_process() -> Self {
        let vars = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
        Self {
            vars: vars.collect(),
            cwd: std::env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
            system: PathBuf::from("/etc"),
            uid: rustix::process::geteuid().as_raw(),
        }
    }
}

/// Where a configuration came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, by its absolute path.
    File(PathBuf),
    /// The one inside the program.
    BuiltIn,
}

impl Source {
    /// The file, when there is one; what a child process gets as `DROVER_CONFIG`.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::BuiltIn => None,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::BuiltIn => f.write_str(BUILT_IN_NAME),
        }
    }
}

/// A configuration and what to say about it.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Where it came from.
    pub source: Source,
    /// Lines for the log: keys without effect, sections that nothing acts on.
    pub warnings: Vec<String>,
}

/// Longest message about one thing.
const MOST_MESSAGE: usize = 1000;

/// What is wrong with a configuration: at least one thing. Displays as one line for each, `file:line:column: what`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Everything that is wrong, in the order of the file.
    pub faults: Vec<Fault>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file, or the environment variable.
    pub origin: String,
    /// Line and column from 1, when it is about a place in a file.
    pub position: Option<(u64, u64)>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may repeat a value, however long that is.
        let message = drover_types::shortened(&self.message, MOST_MESSAGE);
        match self.position {
            Some((line, column)) => write!(f, "{}:{line}:{column}: {message}", self.origin),
            None => write!(f, "{}: {message}", self.origin),
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}

impl LoadError {
    fn of_file(path: &Path, message: impl Into<String>) -> Self {
        let origin = path.display().to_string();
        Self { faults: vec![Fault { origin, position: None, message: message.into() }] }
    }

    fn of(faults: Vec<Fault>) -> Self {
        Self { faults }
    }
}

/// Names places of one file.
struct Origin<'a> {
    name: &'a str,
}

impl Origin<'_> {
    fn fault(&self, place: &Place, message: impl Into<String>) -> Fault {
        let message = message.into();
        match place {
            Place::File { line, column } => {
                Fault { origin: self.name.to_owned(), position: Some((*line, *column)), message }
            }
            Place::Env(variable) => Fault { origin: variable.to_string(), position: None, message },
        }
    }
}

/// Loads the configuration of this process: the file given, or the first that is found, or the built-in one.
pub fn load(explicit: Option<&Path>) -> Result<Loaded, LoadError> {
    Config::load(explicit, &Env::of_process())
}

impl Config {
    /// Loads a configuration: the file given, or the first of `./drover.yaml`, `$XDG_CONFIG_HOME/drover/drover.yaml` and
    /// `/etc/drover/drover.yaml` that exists, or the built-in one; then the environment.
    pub fn load(explicit: Option<&Path>, env: &Env) -> Result<Loaded, LoadError> {
        let (source, shown, text) = find(explicit, env)?;
        let (config, warnings) = Self::from_text(&shown, &text, &env.vars)?;
        Ok(Loaded { config, source, warnings })
    }

    /// Reads a configuration from text; `name` is what messages call it. Gives it with its warnings.
    pub fn from_text(
        name: &str,
        text: &str,
        vars: &BTreeMap<String, String>,
    ) -> Result<(Self, Vec<String>), LoadError> {
        let origin = Origin { name };
        let mut root = tree::parse(text).map_err(|error| {
            let place = Place::File { line: error.line, column: error.column };
            LoadError::of(vec![origin.fault(&place, error.message)])
        })?;
        if !matches!(root.value, Value::Map(_) | Value::Null) {
            return Err(LoadError::of(vec![origin.fault(&root.place, "expected sections such as `router:`")]));
        }
        override_from(vars, &mut root)?;
        let remarks = legacy::modernise(&mut root);
        let (config, mut faults) = read_all(&origin, &root);
        let Some(config) = config else { return Err(LoadError::of(faults)) };
        let mut problems = config.validate();
        if !faults.is_empty() {
            // What is there and cannot be read is not missing.
            problems.retain(|problem| !problem.is_missing());
        }
        faults.extend(locate(&origin, &root, problems));
        if !faults.is_empty() {
            faults.sort_by_key(|fault| fault.position);
            return Err(LoadError::of(faults));
        }
        let warnings = remarks.into_iter().map(|remark| origin.fault(&remark.place, remark.message).to_string());
        Ok((config, warnings.collect()))
    }
}

/// Reads the tree, and goes on without each entry that cannot be read: a person wants to hear of all of them at once.
/// There is no configuration when something is wrong that no entry can be blamed for.
fn read_all(origin: &Origin<'_>, root: &Node) -> (Option<Config>, Vec<Fault>) {
    let mut faults = Vec::new();
    let mut rest = Cow::Borrowed(root);
    for _ in 0..MOST_FAULTS {
        let error = match read::read(rest.as_ref()) {
            Ok(config) => return (Some(config), faults),
            Err(error) => error,
        };
        let place = error.place.unwrap_or(Place::START);
        let fault = origin.fault(&place, error.message);
        // A section stands where its first key does: it takes one round for each key of it.
        if !faults.contains(&fault) {
            faults.push(fault);
        }
        if error.incomplete || !rest.to_mut().forget(&place) {
            break;
        }
    }
    faults.sort_by_key(|fault| fault.position);
    (None, faults)
}

/// Puts each problem where its key stands, in the order of the file.
fn locate(origin: &Origin<'_>, root: &Node, problems: Vec<Problem>) -> Vec<Fault> {
    let mut faults: Vec<Fault> =
        problems.into_iter().map(|problem| origin.fault(&root.place_of(&problem.path), problem.message)).collect();
    faults.sort_by_key(|fault| fault.position);
    let mut told: Vec<Fault> = Vec::new();
    for fault in faults {
        // Two providers of one section can lack the same key.
        if !told.contains(&fault) {
            told.push(fault);
        }
    }
    told
}

/// The file to use: what it is, how messages name it, and its text.
fn find(explicit: Option<&Path>, env: &Env) -> Result<(Source, String, String), LoadError> {
    if let Some(path) = explicit {
        let text = read_file(path, &env.cwd.join(path), None)?.ok_or_else(|| {
            LoadError::of_file(path, "no such file; leave out --config to use the built-in configuration")
        })?;
        return Ok((Source::File(env.cwd.join(path)), path.display().to_string(), text));
    }
    let var = |name: &str| env.vars.get(name).filter(|value| value.starts_with('/')).map(PathBuf::from);
    let user = var("XDG_CONFIG_HOME").or_else(|| var("HOME").map(|home| home.join(".config")));
    let here = (PathBuf::from("./drover.yaml"), env.cwd.join("drover.yaml"), Some(env.uid));
    let others = user.into_iter().chain([env.system.clone()]).map(|dir| {
        let path = dir.join("drover").join("drover.yaml");
        (path.clone(), path, None)
    });
    for (shown, path, owner) in std::iter::once(here).chain(others) {
        if let Some(text) = read_file(&shown, &path, owner)? {
            return Ok((Source::File(path), shown.display().to_string(), text));
        }
    }
    Ok((Source::BuiltIn, BUILT_IN_NAME.to_owned(), BUILT_IN.to_owned()))
}

/// The text of a file; nothing when there is none. With `owner`, a file of another user is refused: whoever can write into
/// the directory that a command happens to run in must not choose what it does.
fn read_file(shown: &Path, path: &Path, owner: Option<u32>) -> Result<Option<String>, LoadError> {
    let unreadable = |error: std::io::Error| LoadError::of_file(shown, format!("cannot be read: {error}"));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    let found = file.metadata().map_err(unreadable)?.uid();
    if let Some(uid) = owner.filter(|uid| *uid != found) {
        let message = format!("belongs to user {found}, not to you ({uid}); give it with --config if you trust it");
        return Err(LoadError::of_file(shown, message));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(LoadError::of_file(shown, "is longer than 4 MiB and cannot be a configuration"));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let good = String::from_utf8_lossy(good);
        let line = good.matches('\n').count() as u64 + 1;
        let column = good.chars().rev().take_while(|c| *c != '\n').count() as u64 + 1;
        let name = shown.display().to_string();
        LoadError::of(vec![Origin { name: &name }.fault(&Place::File { line, column }, "is not UTF-8 text")])
    })
}

/// Puts `DROVER_ROUTER__LISTEN=...` into the tree as `router.listen`.
fn override_from(vars: &BTreeMap<String, String>, root: &mut Node) -> Result<(), LoadError> {
    let mut kinds: Option<BTreeMap<String, String>> = None;
    for (variable, text) in vars {
        let Some(name) = variable.strip_prefix(PREFIX).filter(|name| name.contains("__")) else { continue };
        let kinds = kinds.get_or_insert_with(|| schema::schema().into_iter().map(|key| (key.path, key.kind)).collect());
        let lower = name.to_ascii_lowercase();
        let path: Vec<&str> = lower.split("__").collect();
        let place = Place::Env(Arc::from(variable.as_str()));
        let origin = Origin { name: variable };
        let kind = kinds.get(&path.join(".")).map_or("any value", String::as_str);
        let value =
            env_value(text, kind, &place).map_err(|message| LoadError::of(vec![origin.fault(&place, message)]))?;
        if !root.set(&path, Node { value, place: place.clone() }) {
            return Err(LoadError::of(vec![origin.fault(&place, "a part of this key is no section of the file")]));
        }
    }
    Ok(())
}

/// Reads the text of a variable as a value of that kind. Nothing means unset.
fn env_value(text: &str, kind: &str, place: &Place) -> Result<Value, String> {
    if text.is_empty() {
        return Ok(Value::Null);
    }
    if schema::is_text(kind) {
        return Ok(Value::Text(text.to_owned()));
    }
    if kind.starts_with("list of ") && !text.trim_start().starts_with('[') {
        let kind = kind.trim_start_matches("list of ");
        let item = |part: &str| Ok(Node { value: env_value(part, kind, place)?, place: place.clone() });
        let items: Result<Vec<Node>, String> = text.split(',').map(str::trim).map(item).collect();
        return items.map(Value::List);
    }
    let mut node = tree::parse(text).map_err(|error| error.message)?;
    move_to(&mut node, place);
    Ok(node.value)
}

/// Lines and columns inside a variable would be taken for those of the file.
fn move_to(node: &mut Node, place: &Place) {
    node.place = place.clone();
    match &mut node.value {
        Value::List(items) => items.iter_mut().for_each(|node| move_to(node, place)),
        Value::Map(entries) => {
            for (name, node) in entries {
                name.place = place.clone();
                move_to(node, place);
            }
        }
        Value::Null | Value::Bool(_) | Value::Signed(_) | Value::Unsigned(_) | Value::Float(_) | Value::Text(_) => {}
    }
}
