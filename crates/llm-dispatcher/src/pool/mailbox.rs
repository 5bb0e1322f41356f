//! Exchanges that come as files: looks for requests, answers each, and clears away what nobody waits for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use drover_mailbox::{StreamWriter, is_network_fs};
use drover_service::Context;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::desk::{Desk, Reader};
use super::{Answers, Asks, BadFrame, Frame};

/// How often requests are looked for: while some are under way or were a moment ago, and else; on a file system of this host
/// and on one that several share.
const HOT: Duration = Duration::from_millis(10);
const COLD: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// How long it stays hot.
const STAYS_HOT: Duration = Duration::from_mins(1);
/// How often a node hears that its answer is still awaited.
const STILL: Duration = Duration::from_secs(5);
/// A request that was not touched for so long is of a node that is dead.
const ABANDONED: Duration = Duration::from_mins(3);
/// Largest file of a request: the largest body, with its quotes.
const MOST_OF_ASK: u64 = 40 << 20;
/// No answer fills a segment.
const SEGMENT: u64 = 64 << 20;
/// Bytes of frames that are written together.
const TOGETHER: usize = 256 << 10;

/// A request that is there.
struct Seen {
    touched: SystemTime,
    /// When that was seen to change, by our own clock.
    changed: Instant,
    /// It is gone.
    over: CancellationToken,
}

/// Answers requests until the daemon ends.
pub(super) async fn serve(desk: Desk, root: PathBuf, ctx: Context) {
    let (asks, answers) = (Asks::of(&root), Answers::of(&root));
    let network = is_network_fs(&root).ok().flatten().is_some();
    let cold = if network { COLD.1 } else { COLD.0 };
    let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
    let mut hot_until = Instant::now();
    let mut complained = false;
    let made = asks.clone();
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || made.make()).await {
        debug!(%error, mailbox = %root.display(), "there is no mailbox yet");
    }
    clear_leftovers(&asks, &answers).await;
    loop {
        let list = asks.clone();
        match tokio::task::spawn_blocking(move || list.list()).await {
            Ok(Ok(there)) => {
                complained = false;
                let now = Instant::now();
                seen.retain(|key, known| {
                    let stays = there.contains_key(key);
                    if !stays {
                        known.over.cancel();
                    }
                    stays
                });
                for (key, touched) in there {
                    if let Some(known) = seen.get_mut(&key) {
                        if known.touched != touched {
                            (known.touched, known.changed) = (touched, now);
                        } else if now.duration_since(known.changed) >= ABANDONED {
                            warn!(exchange = key, "nobody waits for an answer any more: its node is dead");
                            let (asks, key) = (asks.clone(), key.clone());
                            let _ = tokio::task::spawn_blocking(move || asks.remove(&key)).await;
                        }
                        continue;
                    }
                    let over = CancellationToken::new();
                    seen.insert(key.clone(), Seen { touched, changed: now, over: over.clone() });
                    hot_until = now + STAYS_HOT;
                    let letter = Letter { asks: asks.clone(), answers: answers.clone(), key, network };
                    let (desk, stopping) = (desk.clone(), ctx.shutdown().clone());
                    ctx.spawn("pool letter", async move { letter.serve(&desk, &over, &stopping).await });
                }
            }
            Ok(Err(error)) if !complained => {
                complained = true;
                warn!(%error, mailbox = %root.display(), "requests of nodes in the mailbox cannot be read");
            }
            Ok(Err(_)) | Err(_) => {}
        }
        let hot = !seen.is_empty() || Instant::now() < hot_until;
        let pause = if hot { HOT.max(if network { COLD.0 } else { HOT }) } else { cold };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.shutdown().cancelled() => return,
        }
    }
}

/// Answers whose request is gone are nobody's.
async fn clear_leftovers(asks: &Asks, answers: &Answers) {
    let (asks, answers) = (asks.clone(), answers.clone());
    let _ = tokio::task::spawn_blocking(move || {
        let Ok(there) = asks.list() else { return };
        for key in answers.list().into_iter().filter(|key| !there.contains_key(key)) {
            let _ = answers.remove(&key);
        }
    })
    .await;
}

/// One request and its answer.
struct Letter {
    asks: Asks,
    answers: Answers,
    key: String,
    network: bool,
}

impl Letter {
    /// Answers it, then waits until its node has taken it away, and forgets it.
    async fn serve(self, desk: &Desk, over: &CancellationToken, stopping: &CancellationToken) {
        let mut whose = None;
        tokio::select! {
            result = self.answer(desk, &mut whose) => if let Err(error) = result {
                warn!(exchange = self.key, %error, "a request in the mailbox cannot be answered");
            },
            () = over.cancelled() => {}
            // The end that the desk then gives is still written, by the answer above, while there is time.
            () = async { stopping.cancelled().await; tokio::time::sleep(Duration::from_secs(1)).await } => {}
        }
        tokio::select! {
            () = over.cancelled() => {}
            () = stopping.cancelled() => return,
        }
        if let Some((node, id)) = whose {
            desk.release(&node, &[id]);
        }
        let (answers, key) = (self.answers, self.key);
        let _ = tokio::task::spawn_blocking(move || answers.remove(&key)).await;
    }

    async fn answer(&self, desk: &Desk, whose: &mut Option<(String, String)>) -> std::io::Result<()> {
        let (asks, key, dir) = (self.asks.clone(), self.key.clone(), self.answers.dir(&self.key));
        let begun = dir.exists();
        let (ask, writer) = tokio::task::spawn_blocking(move || {
            let ask = asks.read(&key, MOST_OF_ASK)?;
            Ok::<_, std::io::Error>((ask, StreamWriter::open(dir, SEGMENT)?))
        })
        .await??;
        let mut writer = Some(writer);
        if begun {
            // An earlier dispatcher began it. What became of the call nobody knows, and it is not made again unasked.
            let end = Frame::End { error: "the dispatcher was started anew".to_owned() };
            return self.write(&mut writer, lines(&[(u64::MAX, end)])?).await;
        }
        *whose = Some((ask.node.clone(), ask.id.clone()));
        let mut reader = match desk.open(ask, 0) {
            Ok(reader) => reader,
            Err(refused) => {
                let end = Frame::End { error: refused.to_string() };
                return self.write(&mut writer, lines(&[(1, end)])?).await;
            }
        };
        loop {
            let taken = reader.taken();
            let text = match tokio::time::timeout(STILL, reader.next()).await {
                Ok(Some(frame)) => lines(&batch(frame, &mut reader))?,
                Ok(None) => return Ok(()),
                Err(_) => {
                    let mut text = Vec::new();
                    Frame::write_wait(taken, &mut text).map_err(std::io::Error::other)?;
                    text
                }
            };
            self.write(&mut writer, text).await?;
        }
    }

    async fn write(&self, writer: &mut Option<StreamWriter>, text: Vec<u8>) -> std::io::Result<()> {
        let Some(mut open) = writer.take() else { return Err(std::io::Error::other("the answer cannot be written")) };
        let network = self.network;
        let (open, written) = tokio::task::spawn_blocking(move || {
            // Readers on other hosts see what has reached the server.
            let written = open.append(&text).and_then(|()| if network { open.sync() } else { Ok(()) });
            (open, written)
        })
        .await?;
        *writer = Some(open);
        written
    }
}

/// A frame, and those that are there behind it.
fn batch(first: Frame, reader: &mut Reader) -> Vec<(u64, Frame)> {
    let mut bytes = first.bytes();
    let mut all = vec![(reader.taken(), first)];
    while bytes < TOGETHER {
        let Some(frame) = reader.ready() else { break };
        bytes += frame.bytes();
        all.push((reader.taken(), frame));
    }
    all
}

fn lines(frames: &[(u64, Frame)]) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for (seq, frame) in frames {
        frame.write(*seq, &mut text).map_err(|error: BadFrame| std::io::Error::other(error))?;
    }
    Ok(text)
}
