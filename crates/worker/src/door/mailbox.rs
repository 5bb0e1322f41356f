//! The way through the mailbox: a request is put there as a file, and its answer is read as it grows.

use std::path::PathBuf;
use std::time::Duration;

use drover_dispatcher::pool::{Answers, Ask, Asks, Frame};
use drover_mailbox::{Cursor, StreamReader, is_network_fs, lines};
use tokio::time::Instant;
use tracing::debug;

use super::carriage::{Broken, Progress, Times};

/// How often the answer is looked at: right after something came, and at last; and on a file system that hosts share.
const LOOK: (Duration, Duration) = (Duration::from_millis(3), Duration::from_millis(40));
const LOOK_NETWORK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// How often the dispatcher is told that this node still waits.
const TOUCH: Duration = Duration::from_secs(20);
/// How much is read in one go.
const CHUNK: usize = 1 << 20;

/// The node's side of the mailbox.
pub(super) struct Mail {
    root: PathBuf,
    times: Times,
}

impl Mail {
    pub(super) fn new(root: PathBuf, times: Times) -> Self {
        Self { root, times }
    }

    pub(super) async fn carry(&self, ask: &Ask, progress: &mut Progress) -> Result<(), Broken> {
        let (asks, key) = (Asks::of(&self.root), Asks::key(&ask.node, &ask.id));
        let (put, (name, ask)) = (asks.clone(), (key.clone(), ask.clone()));
        let root = self.root.clone();
        let network = tokio::task::spawn_blocking(move || {
            put.put(&name, &ask)?;
            Ok::<_, std::io::Error>(is_network_fs(&root).ok().flatten().is_some())
        });
        let network = match network.await {
            Ok(Ok(network)) => network,
            Ok(Err(error)) => return Err(Broken::Unreachable(format!("the mailbox cannot be written: {error}"))),
            Err(error) => return Err(Broken::Unreachable(error.to_string())),
        };
        let (first, last) = if network { LOOK_NETWORK } else { LOOK };
        let mut reader = Some(StreamReader::new(Answers::of(&self.root).dir(&key), Cursor::default()));
        let (mut heard, mut touched, mut begun) = (Instant::now(), Instant::now(), false);
        let mut pause = first;
        loop {
            let Some(mut open) = reader.take() else {
                return Err(Broken::Lost("the answer cannot be read".to_owned()));
            };
            let (open, chunk) = tokio::task::spawn_blocking(move || {
                let chunk = open.next_chunk(CHUNK);
                (open, chunk)
            })
            .await
            .map_err(|error| Broken::Lost(error.to_string()))?;
            reader = Some(open);
            match chunk {
                Ok(Some(chunk)) => {
                    (heard, begun, pause) = (Instant::now(), true, first);
                    for line in lines(&chunk.lines) {
                        let read = Frame::read(line).map_err(|error| Broken::Lost(error.to_string()))?;
                        // What arrived before, on this way or another, is not told twice.
                        if let Some((seq, frame)) = read.filter(|(seq, _)| *seq > progress.have)
                            && (seq == progress.have + 1 || matches!(frame, Frame::End { .. }))
                            && progress.take(frame).await?
                        {
                            return Ok(());
                        }
                    }
                    continue;
                }
                Ok(None) => {}
                Err(error) => debug!(%error, "an answer in the mailbox cannot be read at the moment"),
            }
            let limit = if begun { self.times.silent } else { self.times.found };
            if heard.elapsed() >= limit {
                if !begun {
                    // Nobody has begun it, so nobody is to begin it later.
                    let _ = tokio::task::spawn_blocking(move || asks.remove(&key)).await;
                    return Err(Broken::Unreachable(format!(
                        "no dispatcher has looked into the mailbox for {} s",
                        limit.as_secs()
                    )));
                }
                return Err(Broken::Lost(format!("nothing was heard for {} s", limit.as_secs())));
            }
            if touched.elapsed() >= TOUCH {
                touched = Instant::now();
                let (asks, key) = (asks.clone(), key.clone());
                let _ = tokio::task::spawn_blocking(move || asks.touch(&key)).await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(last);
        }
    }

    pub(super) async fn release(&self, node: &str, id: &str) {
        let (asks, key) = (Asks::of(&self.root), Asks::key(node, id));
        let removed = tokio::task::spawn_blocking(move || asks.remove(&key)).await;
        if let Ok(Err(error)) = removed {
            debug!(%error, "a request stays in the mailbox until the dispatcher clears it away");
        }
    }
}
