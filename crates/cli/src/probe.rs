//! Whether a daemon answers on its port, asked in the plainest way there is.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// How long a healthy daemon may take to say so.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks `/healthz`. The error is one line on what was seen instead of an answer.
pub(crate) async fn healthz(addr: &str) -> Result<(), String> {
    let ask = async {
        let mut stream = TcpStream::connect(addr).await?;
        stream
            .write_all(format!("GET /healthz HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut answer = Vec::new();
        stream.take(4096).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = match tokio::time::timeout(PATIENCE, ask).await {
        Err(_) => return Err(format!("no answer within {} s", PATIENCE.as_secs())),
        Ok(Err(error)) => return Err(error.to_string()),
        Ok(Ok(answer)) => answer,
    };
    let text = String::from_utf8_lossy(&answer);
    let first = text.lines().next().unwrap_or_default();
    match first.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ if text.contains("stopping") => Err("it is stopping".to_owned()),
        _ if first.is_empty() => Err("it closed the connection".to_owned()),
        _ => Err(format!("it answered {first:?}")),
    }
}
