//! What a swarm has on the shared file system before its job is submitted, and what its workers leave there. Blocks.
//!
//! ```text
//! <base>/swarms/<swarm>/drover.yaml    what the workers are configured with
//! <base>/swarms/<swarm>/job-<id>.log   what the job and its workers say
//! <base>/swarms/<swarm>/nodes/<NN>/    identity of a node for the gossip; worker.json: what became of its last worker
//! <base>/mailbox/<swarm>/<NN>/…        as everywhere
//! <base>/mailbox/gossip/voters.json    who may vote first there
//! ```
//!
//! One [`Request`] is one thing to do, and doing it again changes nothing. The allocator answers it itself on the login host; from
//! elsewhere it is sent to our program there (`drover site ground`), which answers it with this very code.

use std::io;
use std::path::{Path, PathBuf};

use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use serde::{Deserialize, Serialize};

use super::core::{Claim, WorkerEnd};
use crate::files;
use crate::local::prepare_mailbox;
use crate::spec::{Bundle, check_path};

/// One thing to do on the shared file system. Later versions may add fields and requests; none is renamed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Request {
    /// Make everything that the workers of a swarm expect to find.
    Prepare(Box<Furniture>),
    /// Who has claimed the nodes of these swarms, each with its number of nodes?
    Claims {
        /// Which.
        swarms: Vec<(SwarmId, u32)>,
    },
    /// Say who may vote first.
    Voters {
        /// The signed charter.
        charter: String,
    },
    /// Take away what only a living swarm needs. Its mailbox is the router's to remove.
    Forget {
        /// Which.
        swarm: SwarmId,
    },
}

/// What a swarm is given.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Furniture {
    /// The swarm.
    pub swarm: SwarmId,
    /// Number of nodes.
    pub nodes: u32,
    /// The configuration of the workers.
    pub config: String,
    /// `AGENTS.md` and skills.
    pub bundle: Bundle,
    /// Identities of the nodes for the gossip, by index: files by name, all of them text. Empty: they are no members.
    #[serde(default)]
    pub identities: Vec<Vec<(String, String)>>,
    /// The signed charter, when there is one.
    #[serde(default)]
    pub charter: Option<String>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "did", rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// Who has claimed what. A swarm whose files cannot be read is left out.
    Claims {
        /// By swarm.
        swarms: Vec<(SwarmId, Vec<Claim>)>,
    },
}

/// Our part of a shared file system that is mounted on this host.
#[derive(Debug, Clone)]
pub struct Ground {
    base: PathBuf,
    mailbox: Mailbox,
}

impl Ground {
    /// With its mailbox where all of ours are.
    pub fn at(base: &Path) -> Self {
        Self { base: base.to_owned(), mailbox: Mailbox::new(base.join("mailbox")) }
    }

    pub(super) fn new(base: &str, mailbox: &str) -> Self {
        Self { base: PathBuf::from(base), mailbox: Mailbox::new(mailbox) }
    }

    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    pub(super) fn mailbox(&self) -> &Path {
        self.mailbox.root()
    }

    /// Directory of a swarm.
    pub(super) fn dir(&self, swarm: &SwarmId) -> PathBuf {
        self.base.join("swarms").join(swarm.as_str())
    }

    /// Does what is asked.
    pub fn answer(&self, request: Request) -> io::Result<Answer> {
        match request {
            Request::Prepare(furniture) => self.prepare(&furniture).map(|()| Answer::Done),
            Request::Claims { swarms } => {
                // A file system that is away says nothing.
                let look = |(swarm, nodes): (SwarmId, u32)| Some((swarm.clone(), self.claims(&swarm, nodes).ok()?));
                Ok(Answer::Claims { swarms: swarms.into_iter().filter_map(look).collect() })
            }
            Request::Voters { charter } => self.lay_charter(&charter).map(|()| Answer::Done),
            Request::Forget { swarm } => self.forget(&swarm).map(|()| Answer::Done),
        }
    }

    fn prepare(&self, furniture: &Furniture) -> io::Result<()> {
        let Furniture { swarm, nodes, config, bundle, identities, charter } = furniture;
        for skill in &bundle.skills {
            check_path(&skill.path).map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        }
        let dir = self.dir(swarm);
        files::make_dir(&dir)?;
        files::replace(&dir, "drover.yaml", ".drover.yaml.new", config.as_bytes())?;
        files::make_dir(self.mailbox.root())?;
        if let Some(charter) = charter {
            self.lay_charter(charter)?;
        }
        for (node, files) in identities.iter().enumerate().take(*nodes as usize) {
            let own = dir.join("nodes").join(format!("{node:02}"));
            files::make_dir(&own)?;
            for (name, content) in files {
                lay(&own, name, content.as_bytes())?;
            }
        }
        prepare_mailbox(&self.mailbox, swarm, *nodes, bundle)
    }

    fn lay_charter(&self, charter: &str) -> io::Result<()> {
        let dir = self.mailbox.root().join("gossip");
        files::make_dir(&dir)?;
        lay(&dir, "voters.json", charter.as_bytes())
    }

    fn claims(&self, swarm: &SwarmId, nodes: u32) -> io::Result<Vec<Claim>> {
        let mut claims = Vec::new();
        for node in (0..nodes).map(NodeIndex) {
            let Some(generation) = self.mailbox.generations(swarm, node)?.last().copied() else { continue };
            let outbox = OutboxId { swarm: swarm.clone(), node, generation };
            if let Some(owner) = self.mailbox.owner(&outbox)? {
                let end = self.end_of(swarm, node, generation, &owner.host);
                claims.push(Claim { node, generation, host: owner.host, pid: owner.pid, end });
            }
        }
        Ok(claims)
    }

    /// What the parent of a node's workers said when the newest of them had ended.
    fn end_of(&self, swarm: &SwarmId, node: NodeIndex, generation: Generation, host: &str) -> Option<WorkerEnd> {
        /// Written by the worker's parent.
        #[derive(Deserialize)]
        struct Word {
            host: String,
            generation: Generation,
            #[serde(flatten)]
            end: WorkerEnd,
        }
        let path = self.dir(swarm).join("nodes").join(format!("{:02}", node.0)).join("worker.json");
        let word: Word = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (word.host == host && word.generation == generation).then_some(word.end)
    }

    fn forget(&self, swarm: &SwarmId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.dir(swarm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Replaces one small file, when it has other content. Not synced: it can be laid again.
fn lay(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot be the name of a file")));
    }
    let path = dir.join(name);
    if std::fs::read(&path).is_ok_and(|found| found == content) {
        return Ok(());
    }
    let fresh = dir.join(format!(".{name}.{}", std::process::id()));
    let written = files::write_new(&fresh, content).and_then(|()| std::fs::rename(&fresh, &path));
    if written.is_err() {
        let _ = std::fs::remove_file(&fresh);
    }
    written
}

/// What of our configuration is the workers' too.
pub(super) fn worker_config(config: &Config) -> String {
    let theirs = Config {
        worker: config.worker.clone(),
        telemetry: config.telemetry.clone(),
        swarm: config.swarm.clone(),
        security: config.security.clone(),
        ..Config::default()
    };
    theirs.dump()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Skill;
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn workers_get_their_part_of_the_configuration() {
        let text = "worker: {agent: echo, drain_grace: 3s}\nrouter: {keep_events: 5}\nswarm: {enabled: false}";
        let config = Config::from_text("test.yaml", text, &BTreeMap::new()).unwrap().0;
        let theirs = Config::from_text("worker.yaml", &worker_config(&config), &BTreeMap::new()).unwrap().0;
        assert_eq!((&theirs.worker, &theirs.swarm), (&config.worker, &config.swarm));
        assert_eq!(theirs.router, Config::default().router);
        assert_eq!(theirs.validate(), []);
    }

    fn furniture(skill: &str) -> Furniture {
        Furniture {
            swarm: "s".parse().unwrap(),
            nodes: 2,
            config: "worker: {agent: echo}\n".into(),
            bundle: Bundle {
                agents_md: "$(rules) 'of' \"mine\"\n".into(),
                skills: vec![Skill { path: skill.into(), content: "how\0".into() }],
            },
            identities: vec![vec![("node.key".into(), "secret".into())]; 2],
            charter: Some("{}".into()),
        }
    }

    /// As over the line: text there and back.
    fn ask(ground: &Ground, request: &Request) -> io::Result<Answer> {
        let line = serde_json::to_string(request)?;
        let answer = serde_json::to_string(&ground.answer(serde_json::from_str(&line)?)?)?;
        Ok(serde_json::from_str(&answer)?)
    }

    #[test]
    fn a_swarm_is_furnished_twice_as_once_and_forgotten_but_for_its_mailbox() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("a base");
        let ground = Ground::at(&base);
        let swarm: SwarmId = "s".parse().unwrap();
        for _ in 0..2 {
            assert_eq!(ask(&ground, &Request::Prepare(Box::new(furniture("a/SKILL.md")))).unwrap(), Answer::Done);
        }
        let read = |path: &str| fs::read_to_string(base.join(path)).unwrap();
        assert_eq!(read("mailbox/s/01/bundle/AGENTS.md"), "$(rules) 'of' \"mine\"\n");
        assert_eq!(read("mailbox/s/00/bundle/.agents/skills/a/SKILL.md"), "how\0");
        assert_eq!(read("mailbox/gossip/voters.json"), "{}");
        assert_eq!(read("swarms/s/nodes/01/node.key"), "secret");
        assert_eq!(fs::metadata(base.join("swarms/s/nodes/01/node.key")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(base.join("swarms/s/nodes/01")).unwrap().count(), 1, "nothing unfinished is left");

        let claims = |nodes| ask(&ground, &Request::Claims { swarms: vec![(swarm.clone(), nodes)] }).unwrap();
        assert_eq!(claims(2), Answer::Claims { swarms: vec![(swarm.clone(), Vec::new())] });
        let outbox = base.join("mailbox/s/01/outbox/3");
        fs::create_dir_all(&outbox).unwrap();
        fs::write(outbox.join("owner.json"), r#"{"host":"n1","pid":7,"start_time":9}"#).unwrap();
        let Answer::Claims { swarms } = claims(2) else { panic!() };
        let claim = &swarms[0].1[0];
        assert_eq!((claim.node.0, claim.generation.0, claim.host.as_str(), claim.pid), (1, 3, "n1", 7));
        assert_eq!(claim.end, None);
        for (generation, host, counts) in [(3, "n1", true), (2, "n1", false), (3, "n2", false)] {
            let word =
                format!(r#"{{"v":1,"host":"{host}","generation":{generation},"state":"failed","reason":"why"}}"#);
            fs::write(base.join("swarms/s/nodes/01/worker.json"), word).unwrap();
            let Answer::Claims { swarms } = claims(2) else { panic!() };
            let told = swarms[0].1[0].end.as_ref().map(|end| (end.state.as_str(), end.reason.as_str()));
            assert_eq!(told, counts.then_some(("failed", "why")));
        }

        for _ in 0..2 {
            assert_eq!(ask(&ground, &Request::Forget { swarm: swarm.clone() }).unwrap(), Answer::Done);
        }
        assert!(!base.join("swarms/s").exists() && base.join("mailbox/s/01").exists());
    }

    #[test]
    fn nothing_is_written_outside() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        let ground = Ground::at(&base);
        for bad in ["../x", "/etc/x", "a/../../x"] {
            assert!(ask(&ground, &Request::Prepare(Box::new(furniture(bad)))).is_err(), "{bad}");
            let mut wrong = furniture("ok");
            wrong.identities = vec![vec![(bad.to_owned(), String::new())]];
            assert!(ask(&ground, &Request::Prepare(Box::new(wrong))).is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<Request>(r#"{"do":"forget","swarm":"../../x"}"#).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
