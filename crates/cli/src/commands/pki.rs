//! `drover pki`: the certificates of this instance. The authority is a directory of the state directory; nobody is asked for it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_service::now_us;
use drover_service::pki::{Authority, Identity, Issued, PkiError};
use serde_json::{Value, json};

use crate::app::App;
use crate::args::{Pki, PkiAction, PkiIssue, PkiRevoke, PkiRotate};
use crate::fault::{Exit, Fault};
use crate::render::colour::Tone;
use crate::render::table::{Cell, Table};

pub(super) fn run(app: &App, args: &Pki) -> anyhow::Result<Exit> {
    if app.global.router.is_some() {
        return Err(Fault::usage(
            "certificates are issued where their authority is, and nobody is told its key over a network",
        )
        .hint("leave out --router, and run the command where the router runs")
        .into());
    }
    let state = app.state()?;
    let authority = || Authority::open_or_create_at(&state.path().join("pki")).map_err(|error| fault(&error));
    match &args.action {
        PkiAction::Init => init(app, &authority()?),
        PkiAction::Issue(args) => issue(app, &authority()?, args),
        PkiAction::List => list(app, &authority()?),
        PkiAction::Rotate(args) => rotate(app, &authority()?, &state.path().join("nodes"), args),
        PkiAction::Revoke(args) => revoke(app, &authority()?, &state.path().join("nodes"), args),
    }
}

fn fault(error: &PkiError) -> Fault {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    Fault::failed(format!("{error}{cause}"))
}

fn lifetime(days: u32) -> Duration {
    Duration::from_secs(u64::from(days) * 24 * 3600)
}

fn init(app: &App, authority: &Authority) -> anyhow::Result<Exit> {
    let id = format!("{:032x}", u128::from_be_bytes(authority.cluster_id()));
    if app.global.json {
        app.screen.out(&json!({"instance": id, "dir": authority.dir()}).to_string())?;
    } else {
        app.screen.out(&format!("instance {id}: its authority is in {}", authority.dir().display()))?;
    }
    Ok(Exit::Done)
}

fn issue(app: &App, authority: &Authority, args: &PkiIssue) -> anyhow::Result<Exit> {
    if args.to.exists() {
        return Err(Fault::failed(format!("{} exists", args.to.display()))
            .hint("choose another directory, or renew what is there: drover pki rotate DIR")
            .into());
    }
    let identity = authority.issue(&args.node, lifetime(args.days)).map_err(|error| fault(&error))?;
    identity.store(&args.to).map_err(|error| fault(&error))?;
    let serial = newest(&authority.issued().map_err(|error| fault(&error))?, &args.node).unwrap_or_default();
    if app.global.json {
        app.screen.out(&json!({"node_id": args.node, "serial": serial, "dir": args.to}).to_string())?;
    } else {
        app.screen.out(&format!("{}: certificate {serial} is in {}", args.node, args.to.display()))?;
        app.screen.note("the directory is a secret of that node: let nobody read it on its way there");
    }
    Ok(Exit::Done)
}

fn newest(issued: &[Issued], node: &str) -> Option<String> {
    issued.iter().rev().find(|issued| issued.node_id == node).map(|issued| issued.serial.clone())
}

fn list(app: &App, authority: &Authority) -> anyhow::Result<Exit> {
    let issued = authority.issued().map_err(|error| fault(&error))?;
    let revoked = authority.revoked_serials().map_err(|error| fault(&error))?;
    let now = now_us() / 1_000_000;
    let states = issued.iter().map(|issued| (issued, state_of(issued, &revoked, now)));
    if app.global.json {
        let fields = |(issued, state): (&Issued, &'static str)| -> Value {
            json!({"node_id": issued.node_id, "serial": issued.serial, "issued": issued.issued, "expires": issued.expires, "state": state})
        };
        app.screen.out(&Value::Array(states.map(fields).collect()).to_string())?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["SERIAL", "STATE", ">DAYS LEFT", "NODE"]);
    for (issued, state) in states {
        let tone = match state {
            "good" => Tone::Good,
            "expired" => Tone::Dim,
            _ => Tone::Bad,
        };
        table.row(vec![
            issued.serial.clone().into(),
            Cell::toned(state, tone),
            (issued.expires.saturating_sub(now) / (24 * 3600)).to_string().into(),
            issued.node_id.clone().into(),
        ]);
    }
    app.screen.table(&table)?;
    Ok(Exit::Done)
}

fn state_of(issued: &Issued, revoked: &BTreeSet<String>, now: u64) -> &'static str {
    match issued {
        issued if revoked.contains(&issued.serial) => "revoked",
        issued if issued.expires <= now => "expired",
        _ => "good",
    }
}

fn rotate(app: &App, authority: &Authority, nodes: &Path, args: &PkiRotate) -> anyhow::Result<Exit> {
    let dirs = if args.dirs.is_empty() { identities(nodes) } else { args.dirs.clone() };
    let before = authority.issued().map_err(|error| fault(&error))?;
    let mut renewed = Vec::new();
    for dir in &dirs {
        let known = Identity::load(dir).map_err(|error| fault(&error))?;
        if known.cluster_id() != authority.cluster_id() {
            return Err(Fault::failed(format!("{} is of another instance", dir.display()))
                .hint("run this with the DROVER_STATE_DIR of that instance")
                .into());
        }
        let fresh = authority.issue(known.node_id(), lifetime(args.days)).map_err(|error| fault(&error))?;
        fresh.store(dir).map_err(|error| fault(&error))?;
        renewed.push((known.node_id().to_owned(), dir));
    }
    if args.revoke {
        let of_these = |issued: &&Issued| renewed.iter().any(|(node, _)| *node == issued.node_id);
        let serials: Vec<String> = before.iter().filter(of_these).map(|issued| issued.serial.clone()).collect();
        authority.revoke_also(&serials).map_err(|error| fault(&error))?;
        lay(authority, &dirs).and_then(|()| lay(authority, &identities(nodes)))?;
    }
    if app.global.json {
        let fields = |(node, dir): &(String, &PathBuf)| json!({"node_id": node, "dir": dir});
        app.screen.out(&Value::Array(renewed.iter().map(fields).collect()).to_string())?;
        return Ok(Exit::Done);
    }
    for (node, dir) in &renewed {
        app.screen.out(&format!("{node}: a fresh key and certificate in {}", dir.display()))?;
    }
    app.screen.note(match renewed.len() {
        0 => "no node has its files on this host; those of clusters are renewed by their allocator",
        _ => "daemons that run show them within seconds",
    });
    Ok(Exit::Done)
}

fn revoke(app: &App, authority: &Authority, nodes: &Path, args: &PkiRevoke) -> anyhow::Result<Exit> {
    let issued = authority.issued().map_err(|error| fault(&error))?;
    let mut serials = Vec::new();
    for name in &args.names {
        let meant = issued.iter().filter(|issued| issued.node_id == *name || issued.serial == *name);
        let meant: Vec<String> = meant.map(|issued| issued.serial.clone()).collect();
        if meant.is_empty() {
            return Err(Fault::failed(format!("no certificate was issued to {name}, and none has this serial number"))
                .hint("`drover pki list` shows them all")
                .into());
        }
        serials.extend(meant);
    }
    authority.revoke_also(&serials).map_err(|error| fault(&error))?;
    lay(authority, &identities(nodes))?;
    if app.global.json {
        app.screen.out(&json!({"revoked": serials}).to_string())?;
        return Ok(Exit::Done);
    }
    app.screen.out(&format!("revoked {} of {} certificates", serials.len(), issued.len()))?;
    app.screen.note(
        "nodes of this host know it within seconds; those of clusters when their allocator next looks, within an hour",
    );
    Ok(Exit::Done)
}

/// The list of what is revoked, beside every identity that can be reached.
fn lay(authority: &Authority, dirs: &[PathBuf]) -> Result<(), Fault> {
    dirs.iter().try_for_each(|dir| authority.lay_revoked(dir)).map_err(|error| fault(&error))
}

/// Identities of the nodes whose files are on this host: `nodes/SWARM/INDEX/identity`.
fn identities(nodes: &Path) -> Vec<PathBuf> {
    let below = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let dirs = below(nodes).into_iter().flat_map(|swarm| below(&swarm)).map(|node| node.join("identity"));
    let mut found: Vec<PathBuf> = dirs.filter(|dir| dir.is_dir()).collect();
    found.sort();
    found
}
