//! A daemon that belongs to another process ends with it, however that one died.
//!
//! Whoever starts it makes its standard input a pipe and keeps the other end. The kernel closes that end with the process,
//! at once and on every kernel; a signal at the parent's death would come when the thread ends that started us.

use tokio::net::unix::pipe;
use tracing::warn;

/// The variable that ties a daemon to its starter: set to `stdin` it ends when its standard input does.
pub const LIFELINE: &str = "DROVER_LIFELINE";

/// Waits until the other end of the line is gone; for ever when there is no line.
pub(crate) async fn cut() {
    if std::env::var_os(LIFELINE).is_none_or(|value| value != "stdin") {
        return std::future::pending().await;
    }
    // Opened anew, so that the mode of the inherited descriptor stays as it is.
    let mut line = match pipe::OpenOptions::new().open_receiver("/proc/self/fd/0") {
        Ok(line) => line,
        Err(error) => {
            warn!(%error, "standard input is no pipe: this process will not notice that its starter is gone");
            return std::future::pending().await;
        }
    };
    let mut ignored = [0; 64];
    loop {
        match tokio::io::AsyncReadExt::read(&mut line, &mut ignored).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}
