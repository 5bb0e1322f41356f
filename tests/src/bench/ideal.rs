//! What the same job costs with nothing of ours in the way.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// A bare TCP echo on loopback; returns its address.
#[expect(clippy::disallowed_methods, reason = "a benchmark's server ends with its process")]
pub async fn tcp_echo() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?.to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(addr)
}

/// Sends `count` copies of `line` to each of the first `readers` connections; returns its address.
#[expect(clippy::disallowed_methods, reason = "a benchmark's server ends with its process")]
pub async fn socket_copy(line: Vec<u8>, count: usize, readers: usize) -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?.to_string();
    let block: Vec<u8> = line.repeat(64);
    tokio::spawn(async move {
        for _ in 0..readers {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            let block = block.clone();
            tokio::spawn(async move {
                for _ in 0..count.div_ceil(64) {
                    if stream.write_all(&block).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(addr)
}

/// Rows per second that SQLite alone takes, in durable transactions of a thousand.
pub fn sqlite_insert(file: &Path, rows: usize, data: &str) -> anyhow::Result<f64> {
    let mut connection = rusqlite::Connection::open(file)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute_batch(
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, ts INTEGER, event TEXT, swarm_id TEXT, job_id TEXT, \
         node_id INTEGER, injection_id TEXT, data BLOB)",
    )?;
    let begun = Instant::now();
    let mut seq = 0_i64;
    while (seq as usize) < rows {
        let transaction = connection.transaction()?;
        {
            let mut insert = transaction.prepare_cached("INSERT INTO events VALUES (?,?,?,?,?,?,?,?)")?;
            for _ in 0..1000 {
                seq += 1;
                insert.execute((
                    seq,
                    1_795_000_000_000_000_i64 + seq,
                    "assistant_delta",
                    "6c1f2c0e-0b1a-4a61-8d2a-6b3f8f1f3c11",
                    "local-6c1f2c0e",
                    seq % 4,
                    "01a1fc60-9f5d-7000-8000-000000000000",
                    data.as_bytes(),
                ))?;
            }
        }
        transaction.commit()?;
    }
    Ok(rows as f64 / begun.elapsed().as_secs_f64())
}

/// Time to append one line to each of `files` files and sync each, with 16 threads.
pub fn append_and_sync(dir: &Path, files: usize, line: &[u8]) -> anyhow::Result<Duration> {
    let open = |index: usize| std::fs::OpenOptions::new().create(true).append(true).open(dir.join(index.to_string()));
    let mut handles = (0..files).map(open).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = handles
            .chunks_mut(files.div_ceil(16))
            .map(|chunk| {
                scope.spawn(move || {
                    chunk.iter_mut().try_for_each(|file| {
                        file.write_all(line)?;
                        rustix::fs::fdatasync(file.as_fd()).map_err(std::io::Error::from)
                    })
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(std::io::Error::other("panicked"))))
    })
    .context("failed to append and sync")?;
    Ok(begun.elapsed())
}

/// How long a byte appended at each of these times, counted from now, waits for a loop that does nothing but look at the
/// file's size after every pause. Needs two threads.
pub fn poll(file: &Path, pause: Duration, times: &[Duration]) -> anyhow::Result<Vec<Duration>> {
    let mut writer = std::fs::File::create_new(file)?;
    let reader = std::fs::File::open(file)?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            times.iter().try_for_each(|&time| {
                std::thread::sleep((begun + time).saturating_duration_since(Instant::now()));
                writer.write_all(b"x")
            })
        });
        let mut waits = Vec::new();
        while waits.len() < times.len() && !(writing.is_finished() && reader.metadata()?.len() <= waits.len() as u64) {
            std::thread::sleep(pause);
            let size = reader.metadata()?.len() as usize;
            let now = begun.elapsed();
            waits.extend(times[waits.len()..size].iter().map(|&time| now.saturating_sub(time)));
        }
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(waits)
    })
}
