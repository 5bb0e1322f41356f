//! From configuration to a bot that answers.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use drover_config::Config;
use drover_service::{Context, Daemon, NoArgs, Server, StateDir, Target, Token, connect};
use drover_sessions::{Door, Doors, local};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::api::Bot;
use crate::chat::Desk;
use crate::keeper::Keeper;

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7956);
/// Updates of one call; Telegram gives no more than a hundred.
const AT_ONCE: usize = 100;
/// Messages that are answered at the same time.
const BUSY: usize = 32;

/// The daemon.
#[derive(Debug)]
pub struct TelegramGateway;

impl Daemon for TelegramGateway {
    const NAME: &'static str = "telegram-gateway";
    const ABOUT: &'static str = "Lets people talk to sessions by writing to a Telegram bot";
    type Args = NoArgs;
    const ONE_THREAD: bool = true;

    async fn run(config: Arc<Config>, _args: NoArgs, ctx: Context) -> anyhow::Result<()> {
        let Some(settings) = config.telegram.clone() else {
            bail!("there is no section `telegram` in the configuration; docs/sessions.md says what goes into it");
        };
        let token = std::env::var(&settings.token_env).unwrap_or_default();
        let token = token.trim();
        if token.is_empty() {
            bail!(
                "the variable {} holds no token; @BotFather gives one (telegram.token_env names the variable)",
                settings.token_env
            );
        }
        let allowed: BTreeSet<i64> = settings.allow_chats.iter().copied().collect();
        if allowed.is_empty() {
            warn!("telegram.allow_chats is empty: nobody is answered; the log names the chats that try");
        }
        let dir = ctx.state().join("telegram").context("failed to make telegram/ in the state directory")?;
        let keeper = Arc::new(Mutex::new(Keeper::open(&dir)?));
        let listener = ctx.bind("the Telegram gateway", ctx.explicit_listen(), DEFAULT_LISTEN)?;
        let taken = Counter::default();
        let registry = ctx.registry();
        registry.lock().unwrap_or_else(PoisonError::into_inner).sub_registry_with_prefix("telegram").register(
            "messages",
            "Messages of allowed chats that were taken",
            taken.clone(),
        );
        Server::new(&ctx).serve(listener)?;
        let entries = settings.entries.iter().map(|entry| Door::at(entry)).collect();
        let doors = Ways { state: ctx.state().clone(), token: ctx.token()?, entries };
        let desk = Desk {
            bot: Bot::new(&settings.base_url, token).context("no connection to Telegram can be made")?,
            keeper,
            doors: Arc::new(doors),
            agent: settings.agent.map_or_else(String::new, |agent| agent.as_str().to_owned()),
        };
        let (bell, rung) = mpsc::channel(1);
        let poll = Poll { desk: desk.clone(), allowed, wait: settings.poll_timeout.get(), bell, taken };
        let polling = ctx.clone();
        ctx.spawn("telegram updates", async move {
            if let Some(Err(error)) = polling.shutdown().run_until_cancelled(poll.run()).await {
                polling.fail(error);
            }
        });
        answer(&ctx, desk, rung).await;
        Ok(())
    }
}

/// Doors to the sessions: those that the configuration names, else the router and the nodes of this host.
struct Ways {
    state: StateDir,
    token: Token,
    entries: Vec<Door>,
}

#[async_trait]
impl Doors for Ways {
    async fn doors(&self) -> Vec<Door> {
        if !self.entries.is_empty() {
            return self.entries.clone();
        }
        let router = connect(Target::Daemon { state: self.state.clone(), name: "router".to_owned() });
        let mut doors = vec![Door::with_token("the router", router, self.token.clone())];
        doors.extend(local(&self.state).into_iter().map(|(node, daemon)| Door::of_daemon(&node, &self.state, &daemon)));
        doors
    }
}

/// Asks for what is written.
struct Poll {
    desk: Desk,
    allowed: BTreeSet<i64>,
    wait: Duration,
    bell: mpsc::Sender<()>,
    taken: Counter,
}

impl Poll {
    /// Ends only when the token is none.
    async fn run(self) -> anyhow::Result<()> {
        loop {
            let (next, room) = {
                let keeper = self.desk.keeper.lock().unwrap_or_else(PoisonError::into_inner);
                (keeper.book().next, keeper.book().room())
            };
            if room == 0 {
                sleep(Duration::from_secs(1)).await;
                continue;
            }
            match self.desk.bot.updates(next, room.min(AT_ONCE), self.wait).await {
                Ok(updates) if updates.is_empty() => {}
                Ok(updates) => {
                    let allowed = self.allowed.clone();
                    let taken = self.desk.note(move |book| book.take(updates.clone(), &allowed)).await;
                    for chat in &taken.strangers {
                        info!(chat, "a chat that telegram.allow_chats does not name is not answered");
                    }
                    self.taken.inc_by(taken.open as u64);
                    // One that rings already will do.
                    let _ = self.bell.try_send(());
                }
                Err(error) if error.is_of_token() => {
                    bail!("{error}: the token is not one of a bot, or telegram.base_url leads elsewhere");
                }
                Err(error) => {
                    warn!(%error, "no messages for the moment");
                    sleep(error.again_in().unwrap_or(Duration::from_secs(30))).await;
                }
            }
        }
    }
}

/// Answers what is in the book, each chat in its order, until the daemon ends. What is not answered then is after the next start.
async fn answer(ctx: &Context, desk: Desk, mut rung: mpsc::Receiver<()>) {
    let (done, mut finished) = mpsc::channel::<i64>(BUSY);
    let mut busy = BTreeSet::new();
    loop {
        let due = {
            let keeper = desk.keeper.lock().unwrap_or_else(PoisonError::into_inner);
            keeper.book().due(&busy)
        };
        for (update, open) in due.into_iter().take(BUSY.saturating_sub(busy.len())) {
            let (desk, done, stop, chat) = (desk.clone(), done.clone(), ctx.shutdown().clone(), open.chat);
            busy.insert(chat);
            ctx.spawn("telegram message", async move {
                stop.run_until_cancelled(desk.answer(update, open)).await;
                let _ = done.send(chat).await;
            });
        }
        tokio::select! {
            () = ctx.shutdown().cancelled() => return,
            Some(chat) = finished.recv() => drop(busy.remove(&chat)),
            Some(()) = rung.recv() => {}
        }
    }
}
