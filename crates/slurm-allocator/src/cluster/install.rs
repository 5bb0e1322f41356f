//! Our program on a cluster: one file, named by what is in it.
//!
//! The directory of a program is named by the checksum of the program, so versions never overwrite each other, a job that was
//! submitted with one keeps it, and two people's laptops that share an account do not quarrel. The program itself takes old ones
//! away (`drover site`).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_ssh::{Command, Exit, Output, Remote, RemotePath, Source, Upload};
use drover_types::{ErrorCode, Failure};

use super::{ClusterSettings, FollowerFound};

/// How long the upload may take. A slow line and a program of 30 MB need minutes.
const UPLOAD: Duration = Duration::from_mins(10);
/// How long it may take to find or to start the follower: the end of an old one and the start of a new one.
const FOLLOWER: Duration = Duration::from_mins(1);
/// Digits of the checksum in the name of its directory.
const NAMED_BY: usize = 16;

/// The file that is placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Where it is here.
    pub path: PathBuf,
    /// SHA-256 of its content, in hexadecimal digits.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

impl Program {
    /// Reads a file for its checksum. Takes a moment.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let content = std::fs::read(path)?;
        let mut sha256 = String::new();
        for byte in ring::digest::digest(&ring::digest::SHA256, &content).as_ref() {
            let _ = write!(sha256, "{byte:02x}");
        }
        Ok(Self { path: path.to_owned(), sha256, bytes: content.len() as u64 })
    }

    /// Where it is placed.
    pub fn place(&self, base: &str) -> String {
        let name = self.sha256.get(..NAMED_BY).unwrap_or(&self.sha256);
        format!("{base}/bin/{name}/drover")
    }
}

/// What placing it came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Where it is now.
    pub path: String,
    /// It had to be sent.
    pub sent: bool,
    /// How long that took.
    pub took: Duration,
}

/// Places the program: checked, and whole or not at all. One that is there already is not sent again.
pub(super) async fn place(
    remote: &dyn Remote,
    settings: &ClusterSettings,
    program: &Program,
) -> Result<Placed, Failure> {
    let begun = tokio::time::Instant::now();
    let path = program.place(&settings.base);
    let to = RemotePath::new(path.clone()).map_err(|error| settings.of_ssh(&error))?;
    let upload = Upload::new(Source::File(program.path.clone()), to).mode(0o700).deadline(UPLOAD);
    let uploaded = remote.upload(upload).await.map_err(|error| settings.of_ssh(&error))?;
    if uploaded.sha256 != program.sha256 {
        // It was replaced while it was read: what lies there under this name would not be what the name says.
        let _ = remote.run(Command::new("rm").args(["-f", "--", &path])).await;
        return Err(settings.unavailable(format!("{} changed while it was uploaded", program.path.display())));
    }
    Ok(Placed { path, sent: uploaded.sent, took: begun.elapsed() })
}

/// Finds the follower of the login host, or has it started.
pub(super) async fn follower(
    remote: &dyn Remote,
    settings: &ClusterSettings,
    program: &str,
) -> Result<FollowerFound, Failure> {
    let command = Command::new(program)
        .args(["site", "follower", "--json", "--base", &settings.base])
        .stdin(settings.follower.clone())
        .deadline(FOLLOWER);
    let answer = run(remote, settings, command).await?;
    serde_json::from_slice(&answer).map_err(|error| {
        let said = String::from_utf8_lossy(&answer).chars().take(200).collect::<String>();
        settings.unavailable(format!("the program on {} answered {said:?}: {error}", settings.name))
    })
}

/// Runs our program there; what it complains about becomes the failure.
pub(super) async fn run(remote: &dyn Remote, settings: &ClusterSettings, command: Command) -> Result<Vec<u8>, Failure> {
    let name = command.name();
    let output = remote.run(command).await.map_err(|error| settings.of_ssh(&error))?;
    judge(settings, &name, &output, ErrorCode::BackendUnavailable)
}

/// What a run of our program there came to. `told_as` is the code of what it complains about itself.
pub(super) fn judge(
    settings: &ClusterSettings,
    name: &str,
    output: &Output,
    told_as: ErrorCode,
) -> Result<Vec<u8>, Failure> {
    if output.success() {
        return Ok(output.stdout.to_vec());
    }
    let said = output.complaint();
    if let Some(failure) = told(settings, &said) {
        return Err(Failure { code: told_as, ..failure });
    }
    if output.exit == Exit::Code(64) && said.contains("unrecognized subcommand") {
        let message = format!("{name} on {} is a drover of an earlier version than this one", settings.name);
        let failure = Failure::new(ErrorCode::ProviderUnavailable, message);
        return Err(failure.hint("build the file that cluster.slurm.program names anew, from this version"));
    }
    // A loader that is too old, a processor of another kind, a file system without the right to execute.
    let foreign = matches!(output.exit, Exit::Code(126 | 127))
        || ["GLIBC_", "Exec format error", "cannot execute", "ermission denied"].iter().any(|sign| said.contains(sign));
    let failure = settings.unavailable(format!("{name} on {} ended with {}: {said}", settings.name, output.exit));
    Err(if foreign {
        // Trying again changes nothing.
        Failure { code: ErrorCode::ProviderUnavailable, ..failure }.hint(
            "the program does not run there: name a static build for that machine with cluster.slurm.program (`cargo xtask \
             dist` makes one), and check that the directory is not mounted noexec",
        )
    } else {
        failure
    })
}

/// The words that our program fails with when it is asked for JSON.
fn told(settings: &ClusterSettings, said: &str) -> Option<Failure> {
    let line = said.lines().rev().find(|line| line.starts_with('{'))?;
    let document: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |key: &str| document.get("error")?.get(key)?.as_str().map(str::to_owned);
    let failure = settings.unavailable(format!("on {}: {}", settings.name, text("message")?));
    Some(match text("hint").filter(|hint| !hint.is_empty()) {
        Some(hint) => failure.hint(hint),
        None => failure,
    })
}
