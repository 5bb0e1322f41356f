//! `drover fetch`: what a fetch worker would see of a page, or why it would not read it.

use drover_dispatcher::fetch::{FetchError, FetchSettings, Fetcher, FetcherError, Page};
use drover_dispatcher::research::flags;
use serde_json::{Value, json};

use crate::app::App;
use crate::args::Fetch;
use crate::fault::{Exit, Fault};

pub(super) async fn run(app: &App, args: &Fetch) -> anyhow::Result<Exit> {
    let fetcher = fetcher(app)?;
    let spinner = app.screen.spinner("reading the page");
    let result = fetcher.fetch(&args.url).await;
    drop(spinner);
    if app.global.json {
        // A refusal is what was asked about, so it is an answer too.
        let document = result.as_ref().map_or_else(|error| refusal(&args.url, error), document);
        app.screen.out(&document.to_string())?;
        return Ok(if result.is_ok() { Exit::Done } else { Exit::Failed });
    }
    let page = result.map_err(|error| fault(&error))?;
    show(app, &page)?;
    Ok(Exit::Done)
}

/// The fetcher of this program, as the configuration wants it.
fn fetcher(app: &App) -> Result<Fetcher, Fault> {
    let scaling = crate::dispatcher::configured(app)?.scaling;
    Fetcher::new(FetchSettings::from(&scaling.fetch)).map_err(|error| match error {
        FetcherError::Allow(_) => Fault::new(Exit::BadConfig, error.to_string())
            .hint("list hosts, or hosts with a port, such as wiki.example.lan or 127.0.0.1:8080"),
        FetcherError::Client(_) => Fault::failed(format!("{:#}", anyhow::Error::from(error)))
            .hint("look whether this machine has certificates of authorities (package ca-certificates)"),
    })
}

fn fault(error: &FetchError) -> Fault {
    let said = if error.is_refusal() || matches!(error, FetchError::Robots { .. }) { "refused" } else { "not read" };
    Fault::failed(format!("{said}: {error}")).hint(error.hint())
}

fn show(app: &App, page: &Page) -> std::io::Result<()> {
    for place in &page.redirects {
        app.screen.note(&format!("moved to {place}"));
    }
    let mut about = vec![page.content_type.clone(), page.charset.clone(), format!("{} bytes", page.bytes)];
    about.push(format!("{} characters of text", page.text.chars().count()));
    if page.content_type.contains("html") {
        about.push(if page.article { "an article" } else { "no article found, so all of it" }.to_owned());
    }
    if page.truncated {
        about.push("cut: it is longer than node_scaling.fetch.max_bytes".to_owned());
    }
    app.screen.note(&about.join(", "));
    let flags = flags(&page.text);
    if !flags.is_empty() {
        app.screen.note(&format!("reads like orders to a model ({}); workers get it as data", flags.join(", ")));
    }
    if let Some(title) = &page.title {
        app.screen.out(&format!("# {title}\n"))?;
    }
    app.screen.out(&page.text)
}

fn document(page: &Page) -> Value {
    json!({
        "ok": true,
        "asked": page.asked,
        "url": page.url,
        "redirects": page.redirects,
        "status": page.status,
        "content_type": page.content_type,
        "charset": page.charset,
        "title": page.title,
        "article": page.article,
        "text": page.text,
        "chars": page.text.chars().count(),
        "sha256": page.sha256,
        "bytes": page.bytes,
        "truncated": page.truncated,
        "flags": flags(&page.text),
        "elapsed_ms": page.elapsed.as_millis() as u64,
    })
}

fn refusal(url: &str, error: &FetchError) -> Value {
    json!({
        "ok": false,
        "asked": url,
        "code": error.code(),
        "refused": error.is_refusal(),
        "error": error.to_string(),
        "hint": error.hint(),
    })
}
