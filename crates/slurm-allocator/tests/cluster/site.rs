//! A login host: sshd, a program that stands for `drover` there, and real followers in this process.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use drover_config::Config;
use drover_follower::{Follower, FollowerArgs, Settings};
use drover_proto::common::NodeRef;
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{DeliverRequest, Delivery};
use drover_service::{Context, Server, Target};
use drover_slurm_allocator::cluster::{Cluster, ClusterSettings, Way, serve_relay};
use tonic::Status;
use tonic::transport::Channel;

use crate::support::{Sshd, executable};

const PATIENCE: Duration = Duration::from_secs(30);

/// Stands for the program: it says where the follower is as a file tells it, counts how often it was asked, and connects its
/// input and output to an address. Its size is that of a small program.
const PROGRAM: &str = r#"#!/bin/bash
here=SITE
case "$1 $2" in
"site follower") echo asked >> "$here/asked"; cat > "$here/settings"; cat "$here/answer" ;;
"site probe") cat "$here/report" ;;
connect*) echo connected >> "$here/connected"
  exec 3<>"/dev/tcp/${2%:*}/${2##*:}" || exit 69
  cat <&3 & cat >&3; kill $! 2>/dev/null; wait ;;
esac
"#;

pub(crate) struct Site {
    pub(crate) sshd: Sshd,
    pub(crate) ctx: Context,
    pub(crate) settings: ClusterSettings,
    pub(crate) dir: PathBuf,
    _state: tempfile::TempDir,
}

impl Site {
    pub(crate) fn start(config: &str) -> Option<Self> {
        let sshd = Sshd::with(config, "")?;
        let state = tempfile::tempdir().unwrap();
        let ctx = Context::for_test("slurm-allocator", state.path());
        let dir = sshd.path("home");
        let program = sshd.path("program");
        executable(&program, &PROGRAM.replace("SITE", &dir.display().to_string()));
        let settings = ClusterSettings {
            name: "hpc".to_owned(),
            way: Way::Builtin(Box::new(sshd.settings("drover-sh"))),
            base: format!("{}/shared dir", dir.display()),
            program,
            follower: "{}".to_owned(),
            own_follower: false,
        };
        Some(Self { sshd, ctx, settings, dir, _state: state })
    }

    /// A follower on the login host; its own context, so that it can end alone. What is asked for it from now on is there.
    pub(crate) fn follower(&self, name: &str) -> Context {
        let ctx = Context::for_test("outbox-follower", &self.dir.join(name));
        let mailbox = PathBuf::from(self.settings.mailbox());
        let args = FollowerArgs { mailbox: Some(mailbox), ..FollowerArgs::default() };
        let settings = Settings::new(&Config::default(), args, ctx.state().path());
        let follower = Follower::start(settings, &ctx).unwrap();
        let listener = ctx.bind("test", None, "127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = Server::new(&ctx).grpc(follower.service()).serve(listener).unwrap();
        self.answer(addr);
        ctx
    }

    pub(crate) fn answer(&self, addr: SocketAddr) {
        let answer = serde_json::json!({
            "listen": addr, "host": "login", "pid": 1, "version": "0.1.0", "started": true, "replaced": false,
            "a_field_of_a_later_version": 1,
        });
        fs::write(self.dir.join("answer"), format!("{answer}\n")).unwrap();
    }

    /// How often something was done there.
    pub(crate) fn count(&self, what: &str) -> usize {
        fs::read_to_string(self.dir.join(what)).unwrap_or_default().lines().count()
    }

    pub(crate) fn cluster(&self) -> Cluster {
        Cluster::new(&self.ctx, self.settings.clone())
    }

    /// A client that finds the follower as the router does.
    pub(crate) fn client(&self, cluster: &Cluster) -> Client {
        serve_relay(&self.ctx, std::slice::from_ref(cluster)).unwrap();
        let name = cluster.settings().follower_name();
        let channel = drover_service::connect(Target::Daemon { state: self.ctx.state().clone(), name });
        Client(MailboxServiceClient::new(channel))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
    }
}

pub(crate) struct Client(pub(crate) MailboxServiceClient<Channel>);

impl Client {
    pub(crate) async fn deliver(&mut self, record: &str) -> Result<(), Status> {
        let node = Some(NodeRef { swarm_id: "swarm-1".to_owned(), node_id: 0 });
        let deliveries = vec![Delivery { node, record: record.to_owned().into() }];
        let answer = self.0.deliver(DeliverRequest { deliveries }).await?.into_inner();
        assert_eq!(answer.results.len(), 1);
        // One that is about to end refuses what comes.
        let error = &answer.results[0].error;
        if error.is_empty() { Ok(()) } else { Err(Status::unavailable(error)) }
    }

    /// Repeats a delivery until it succeeds.
    pub(crate) async fn deliver_in_time(&mut self, record: &str) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(status) = self.deliver(record).await {
            assert!(Instant::now() < deadline, "not delivered: {status}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
