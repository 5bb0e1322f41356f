//! What a node does: reads a page, with the guard, the bounds and the manners that the dispatcher has too.

use anyhow::Context as _;
use drover_config::NodeScalingConfig;
use drover_proto::tasks as pb;

use super::kinds;
use crate::call::{CallAnswer, CallError, FailureKind, Finish};
use crate::errands;
use crate::fetch::{FetchSettings, Fetcher};

/// Reads pages on a node.
#[derive(Debug)]
pub struct Hand {
    fetcher: Fetcher,
}

impl Hand {
    /// As configured on this node.
    pub fn new(scaling: &NodeScalingConfig) -> anyhow::Result<Self> {
        let fetcher =
            Fetcher::new(FetchSettings::from(&scaling.fetch)).context("failed to set up the reading of pages")?;
        Ok(Self { fetcher })
    }

    /// Does one attempt. Dropping the future ends it.
    pub async fn do_attempt(&self, attempt: &pb::Attempt) -> pb::AttemptResult {
        let number = attempt.attempt;
        let Some(kind) = kinds::named(&attempt.kind) else {
            let error = format!("this node does not take {:?} tasks", attempt.kind);
            return failed(number, FailureKind::Unsupported, error);
        };
        match errands::read(&self.fetcher, kind, &attempt.url).await {
            Ok(answer) => pb::AttemptResult {
                attempt: number,
                text: answer.text,
                detail: answer.structured.map(|detail| detail.to_string()).unwrap_or_default(),
                ..pb::AttemptResult::default()
            },
            Err(error) => failed(number, error.kind, error.message),
        }
    }
}

fn failed(attempt: u64, kind: FailureKind, error: String) -> pb::AttemptResult {
    pb::AttemptResult { attempt, error, failure: kind.as_str().to_owned(), ..pb::AttemptResult::default() }
}

/// The result of a node as the dispatcher takes it.
#[expect(clippy::result_large_err, reason = "made once for each page, and taken apart at once")]
pub(super) fn outcome(result: pb::AttemptResult) -> Result<CallAnswer, CallError> {
    if result.error.is_empty() {
        let structured = serde_json::from_str(&result.detail).ok();
        return Ok(CallAnswer { structured, ..CallAnswer::of(result.text, Finish::Stop) });
    }
    let kind = match result.failure.as_str() {
        "broken" => FailureKind::Broken,
        "timeout" => FailureKind::Timeout,
        "server" => FailureKind::Server,
        "unsupported" => FailureKind::Unsupported,
        _ => FailureKind::BadRequest,
    };
    Err(CallError { maybe_billed: false, ..CallError::new(kind, result.error) })
}

#[cfg(test)]
mod tests {
    use drover_config::FetchConfig;

    use super::*;
    use crate::fetch::loopback::{Loopback, Said};

    #[tokio::test]
    async fn a_node_reads_with_the_guard_of_its_own_configuration() {
        let site = Loopback::serve(|asked| match asked.path.as_str() {
            "/robots.txt" => Said::new(404, "text/plain", ""),
            "/page" => Said::new(200, "text/plain", "words of a page"),
            "/empty" => Said::new(200, "text/plain", " "),
            "/long" => Said::new(200, "text/plain", "word ".repeat(10_000)),
            _ => Said::new(503, "text/plain", ""),
        });
        let attempt = |path: &str| pb::Attempt { attempt: 7, kind: "fetch".to_owned(), url: site.url(path) };
        let closed = Hand::new(&NodeScalingConfig::default()).unwrap();
        let refused = closed.do_attempt(&attempt("/page")).await;
        assert_eq!(
            (refused.attempt, refused.failure.as_str(), site.asked().len()),
            (7, "bad_request", 0),
            "{refused:?}"
        );

        let fetch = FetchConfig { allow: vec![site.addr.to_string()], ..FetchConfig::default() };
        let open = Hand::new(&NodeScalingConfig { fetch, ..NodeScalingConfig::default() }).unwrap();
        let answer = outcome(open.do_attempt(&attempt("/page")).await).unwrap();
        assert!(answer.text.contains("words of a page") && answer.structured.is_some(), "{answer:?}");
        let error = outcome(open.do_attempt(&attempt("/gone")).await).unwrap_err();
        assert_eq!((error.kind, error.maybe_billed), (FailureKind::Server, false));
        let extract = |path: &str| pb::Attempt { kind: "extract".to_owned(), ..attempt(path) };
        let long = outcome(open.do_attempt(&extract("/long")).await).unwrap();
        assert_eq!(long.text.chars().count(), crate::extract::CHARS, "only what the model will see");
        let whole = outcome(open.do_attempt(&attempt("/long")).await).unwrap();
        assert!(whole.text.chars().count() > crate::extract::CHARS);
        let empty = outcome(open.do_attempt(&extract("/empty")).await).unwrap_err();
        assert_eq!(empty.kind, FailureKind::BadRequest);
        let odd = open.do_attempt(&pb::Attempt { kind: "dream".to_owned(), ..attempt("/page") }).await;
        assert_eq!(outcome(odd).unwrap_err().kind, FailureKind::Unsupported);
    }
}
