//! Puts the router together and takes it apart again.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_config::Config;
use drover_control::ControlSettings;
use drover_proto::handoff::handoff_service_server::HandoffServiceServer;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_proto::router::router_service_server::RouterServiceServer;
use drover_service::{Context, Daemon, MAX_MESSAGE_BYTES, Server, now_us, process};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::core::input::Input;
use crate::core::model::Settings;
use crate::doors::{Doors, LineDoor, SessionDoors, guard};
use crate::gauges::Gauges;
use crate::grpc::Service;
use crate::metrics::Metrics;
use crate::owner::Owner;
use crate::registry::Shared;
use crate::sessions::Sessions;
use crate::shell::{Dispatch, RingFile, run_allocator, run_follower, sent};
use crate::store::{Command, Past, Retention, StoreHandle, StoreSettings, UNUSED, Writer, place};

/// Default addresses.
const GRPC: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7950);
const CONTROL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8765);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(200);
/// Bytes of recent events that are kept in memory.
const RING_BYTES: u64 = 16 << 20;
/// What an existing client's router is called to where its address is concerned.
const HOST_VARIABLE: &str = "CODESWARM_ROUTER_HOST";
const PORT_VARIABLE: &str = "CODESWARM_ROUTER_PORT";
const PID_FILE_VARIABLE: &str = "CODESWARM_ROUTER_PID_FILE";

/// The router daemon.
pub struct Router;

/// Flags of the router beside the common ones.
#[derive(Debug, Default, clap::Args)]
pub struct RouterArgs {
    /// Accepted for existing clients: the router always serves, in the foreground. Allocator and follower are then started
    /// too when they do not run
    #[arg(long)]
    daemon: bool,
    /// Also tell clients of the JSON-line control plane what the router does on their behalf
    #[arg(long)]
    debug: bool,
    /// Take the state directory from a router of another host that is certain not to run any more
    #[arg(long)]
    take_over: bool,
}

impl Daemon for Router {
    const NAME: &'static str = "router";
    const ABOUT: &'static str =
        "Keeps the swarms, carries prompts to their nodes, and keeps and hands out the event log";
    type Args = RouterArgs;

    async fn run(config: Arc<Config>, args: RouterArgs, ctx: Context) -> anyhow::Result<()> {
        serve(&config, &args, &ctx).await
    }
}

/// Serves until the context says stop, then leaves everything in order.
async fn serve(config: &Config, args: &RouterArgs, ctx: &Context) -> anyhow::Result<()> {
    let dir = ctx.state().join("router").context("failed to make router/ in the state directory")?;
    let mut owner = Owner::take(&dir, &process::hostname(), args.take_over)?;
    let audit = ctx.state().path().join("audit");
    let guard = guard(ctx, &config.security, &audit)
        .with_context(|| format!("cannot keep the doors; the audit log is in {}", audit.display()))?;
    let listener =
        ctx.bind("router", ctx.explicit_listen().or(config.router.listen), GRPC)?.with_guests(guard.guests());
    let control =
        ctx.bind("the JSON-line control plane", control_address(config)?, CONTROL)?.with_guests(guard.guests());
    let control_addr = control.local_addr();

    let metrics = Metrics::default();
    metrics.register(&mut ctx.registry().lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    let dispatch = Dispatch::default();
    let plans = Arc::clone(&dispatch.plans);
    let (store, commands) = StoreHandle::new();
    let settings = store_settings(config, &dir);
    let past = Past::new(&settings.place, &store);
    close_unused(ctx, &past);
    let (opened, opened_now) = oneshot::channel();
    let (ended, writer_ended) = oneshot::channel::<anyhow::Result<()>>();
    let writer_metrics = metrics.clone();
    std::thread::Builder::new().name("store".to_owned()).spawn(move || {
        match Writer::open(settings, dispatch, writer_metrics, now_us) {
            Ok((writer, shared)) => {
                // The receivers leave only when the router is stopping.
                let _ = opened.send(Ok(shared));
                let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| writer.run(commands)));
                let _ = ended.send(run.map_err(|_| anyhow::anyhow!("the writer's thread panicked")));
            }
            Err(error) => {
                let _ = opened.send(Err(error));
            }
        }
    })?;
    let shared: Arc<Shared> = opened_now.await.context("the writer's thread ended")??;
    // Set before anybody can ask: it never changes.
    let _ = shared.control_addr.set(control_addr.to_string());
    let _ = shared.audit_error.set(guard.trouble());
    let gauges = Box::new(Gauges(Arc::clone(&shared)));
    ctx.registry().lock().unwrap_or_else(std::sync::PoisonError::into_inner).register_collector(gauges);

    let ring = RingFile::new(ctx.state());
    let service = Service {
        ctx: ctx.clone(),
        shared: Arc::clone(&shared),
        store: store.clone(),
        past,
        metrics: metrics.clone(),
        subscriber_max_bytes: config.router.subscriber_max_bytes.0,
        allocator: ctx.channel("slurm-allocator"),
        ring: ring.clone(),
        providers: arc_swap::ArcSwap::default(),
    };
    let service = Arc::new(service);
    let grpc = RouterServiceServer::new(Doors { inner: service, guard: Arc::clone(&guard) })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let sessions = Arc::new(Sessions::new(ctx, Arc::clone(&shared)));
    let sessions = HandoffServiceServer::new(SessionDoors { inner: sessions, guard: Arc::clone(&guard) })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let addr = Server::new(ctx).grpc(grpc.clone()).grpc(sessions).serve(listener)?;
    if let Err(error) = owner.set_listen(addr) {
        warn!(%error, "failed to write the address to owner.json");
    }
    ctx.publish_control(control_addr).context("failed to write the address book")?;
    let settings = ControlSettings {
        max_line_bytes: config.router.max_line_bytes.0 as usize,
        client_max_bytes: config.router.subscriber_max_bytes.0 as usize,
        debug: args.debug,
        entrance: Arc::new(LineDoor(Arc::clone(&guard))),
    };
    let control_ctx = ctx.clone();
    ctx.spawn("control", async move {
        let served =
            drover_control::serve(control_ctx.clone(), control, RouterServiceClient::new(grpc), settings).await;
        if let Err(error) = served {
            control_ctx.fail(error.context("the JSON-line control plane ended"));
        }
    });
    // For people and programs that start us as they started the router of old.
    let _ = writeln!(std::io::stderr(), "TCP CONTROL READY {control_addr}");
    let _pid_file = PidFile::write(ctx.state().path());

    run_follower(ctx, &plans, &store, &metrics, ctx.channel("outbox-follower"));
    run_allocator(ctx, &plans, &store, ctx.channel("slurm-allocator"));
    spawn_ticks(ctx, &store);
    send_ring(ctx, &store, ring);
    let ended = wait_for_end(ctx, &store, writer_ended).await;
    guard.close().await;
    ended
}

/// Waits for the word to stop, or for the writer to end unasked; then lets the writer finish.
async fn wait_for_end(
    ctx: &Context,
    store: &StoreHandle,
    mut writer_ended: oneshot::Receiver<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    tokio::select! {
        () = ctx.shutdown().cancelled() => {}
        ended = &mut writer_ended => {
            ended.unwrap_or_else(|_| Err(anyhow::anyhow!("the writer's thread ended")))?;
            bail!("the writer's thread ended");
        }
    }
    store.tell(Command::Stop).await;
    writer_ended.await.unwrap_or_else(|_| Err(anyhow::anyhow!("the writer's thread ended")))?;
    info!("event log is closed");
    Ok(())
}

fn spawn_ticks(ctx: &Context, store: &StoreHandle) {
    let (store, shutdown) = (store.clone(), ctx.shutdown().clone());
    ctx.spawn("ticks", async move {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
            store.tell(Command::Happened(Input::Tick)).await;
        }
    });
}

/// A subscriber that was behind for once leaves connections to the event log, and none is needed while all keep up.
fn close_unused(ctx: &Context, past: &Past) {
    let (past, shutdown) = (past.clone(), ctx.shutdown().clone());
    ctx.spawn("unused readers", async move {
        while shutdown.run_until_cancelled(tokio::time::sleep(UNUSED / 2)).await.is_some() {
            past.close_unused(Instant::now());
        }
    });
}

/// A router that ended between a change of the ring and its word to the nodes makes up for it.
fn send_ring(ctx: &Context, store: &StoreHandle, ring: RingFile) {
    let store = store.clone();
    ctx.spawn("key ring", async move {
        if let Some(ring) = ring.find().await {
            store.tell(Command::Happened(Input::Ring(sent(&ring)))).await;
        }
    });
}

fn store_settings(config: &Config, dir: &Path) -> StoreSettings {
    let router = &config.router;
    let micros = |duration: Duration| duration.as_micros() as u64;
    StoreSettings {
        place: place(dir),
        core: Settings {
            default_agent: config.worker.agent.as_str().to_owned(),
            soft_timeout: micros(router.launch_soft_timeout.0),
            hard_timeout: micros(router.launch_hard_timeout.0),
            graceful: micros(router.graceful_terminate_timeout.0),
            keep_ended: micros(router.keep_ended_swarms_for.0),
        },
        ring_bytes: RING_BYTES,
        keep: Retention { age: micros(router.keep_events_for.0), count: router.keep_events },
    }
}

/// The address that was asked for: the environment of existing clients before the configuration.
fn control_address(config: &Config) -> anyhow::Result<Option<SocketAddr>> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    address_from(set(HOST_VARIABLE).as_deref(), set(PORT_VARIABLE).as_deref(), config.router.control_listen)
}

fn address_from(
    host: Option<&str>,
    port: Option<&str>,
    configured: Option<SocketAddr>,
) -> anyhow::Result<Option<SocketAddr>> {
    if host.is_none() && port.is_none() {
        return Ok(configured);
    }
    let base = configured.unwrap_or(CONTROL);
    let ip = match host {
        None => base.ip(),
        Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(host) => host
            .parse()
            .with_context(|| format!("{HOST_VARIABLE}={host} is no address; write one such as 127.0.0.1"))?,
    };
    let port = match port {
        None => base.port(),
        Some(port) => {
            port.parse().with_context(|| format!("{PORT_VARIABLE}={port} is no port; write one such as 8765"))?
        }
    };
    Ok(Some(SocketAddr::new(ip, port)))
}

/// Tells existing clients whom to stop.
struct PidFile(Option<PathBuf>);

impl PidFile {
    fn write(dir: &Path) -> Self {
        let named = std::env::var_os(PID_FILE_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        let path = named.unwrap_or_else(|| dir.join("router.pid"));
        match std::fs::write(&path, format!("{}\n", std::process::id())) {
            Ok(()) => Self(Some(path)),
            Err(error) => {
                warn!(path = %path.display(), %error, "failed to write the PID file");
                Self(None)
            }
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        // Only our own: a successor may have written its own already.
        let mine = std::fs::read_to_string(path).is_ok_and(|text| text.trim() == std::process::id().to_string());
        if mine {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_of_existing_clients_chooses_the_control_address() {
        let configured = "127.0.0.1:9000".parse().ok();
        assert_eq!(address_from(None, None, configured).unwrap(), configured);
        assert_eq!(address_from(None, None, None).unwrap(), None, "a default may be replaced by a free port");
        let chosen = |host, port| address_from(host, port, configured).unwrap().unwrap().to_string();
        assert_eq!(chosen(Some("localhost"), Some("1234")), "127.0.0.1:1234");
        assert_eq!(chosen(None, Some("1234")), "127.0.0.1:1234");
        assert_eq!(chosen(Some("127.0.0.2"), None), "127.0.0.2:9000");
        assert!(address_from(Some("nowhere"), None, None).unwrap_err().to_string().contains(HOST_VARIABLE));
        assert!(address_from(None, Some("x"), None).unwrap_err().to_string().contains(PORT_VARIABLE));
    }
}
