//! `drover setup`: from nothing to a configuration whose key is known to work.
//!
//! On a terminal it asks for what the command line leaves open; else what is missing is an error that names it. A key is read
//! from the environment, from a file that only its owner can read, or from standard input: never from the command line, which
//! everybody on the machine can see. It is shown to nobody.

mod terminal;
mod write;

use std::collections::BTreeMap;
use std::path::PathBuf;

use drover_config::{Env, ModelPricing, ProviderSettings};
use drover_dispatcher::core::{Money, Price};
use drover_dispatcher::setup::{self, KeyFound, Offer, Probed};
use drover_dispatcher::{key_dir, key_file, setup_file};
use drover_service::address_book;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::app::App;
use crate::args::Setup;
use crate::daemons::DISPATCHER;
use crate::fault::{Exit, Fault};
use crate::render::table::{Cell, Table};

use terminal::Terminal;

/// A day's cap unless another is asked for: that of the founding document.
const CAP: f64 = 5.0;
/// Calls at once unless others are asked for: likewise.
const AT_ONCE: u32 = 5;

pub(super) async fn run(app: &App, args: Setup) -> anyhow::Result<Exit> {
    let today = Timestamp::now().to_string().get(..10).unwrap_or_default().to_owned();
    let (offers, date) = setup::offers(&today);
    if args.list {
        list(app, &offers, &date)?;
        return Ok(Exit::Done);
    }
    let env = Env::of_process();
    let keys = key_dir(&env);
    let to = target(app, &args, &env)?;
    let terminal = Terminal::when(!app.global.json && !args.key_stdin);
    let chosen = choose(app, &args, &offers, terminal.as_ref())?;
    let plan = Plan { keys, to, today, chosen };
    carry_out(app, &args, plan, terminal.as_ref()).await
}

/// What was chosen.
struct Chosen {
    provider: ProviderSettings,
    pricing: BTreeMap<String, ModelPricing>,
    max_nodes: u32,
    why_nodes: String,
    max_concurrent_api: u32,
    cap: Option<f64>,
}

struct Plan {
    keys: Option<PathBuf>,
    to: PathBuf,
    today: String,
    chosen: Chosen,
}

/// Where the configuration goes. One that would not be read is not written.
fn target(app: &App, args: &Setup, env: &Env) -> Result<PathBuf, Fault> {
    let to = match &args.to {
        Some(to) => std::path::absolute(to).map_err(|error| Fault::usage(format!("{}: {error}", to.display())))?,
        None if app.config.node_scaling.is_some() => {
            let message =
                format!("{} has a node_scaling section, which wins over what setup writes", app.config_source);
            return Err(Fault::failed(message).hint("change that section, or write another file with --to FILE"));
        }
        None => setup_file(env).ok_or_else(|| {
            Fault::failed("no place for the configuration: neither XDG_CONFIG_HOME nor HOME is set")
                .hint("name a file with --to FILE")
        })?,
    };
    if to.exists() && !args.force && !write::is_ours(&to) {
        return Err(Fault::failed(format!("{} is there already, and not from `drover setup`", to.display()))
            .hint("--force replaces it, and keeps it as a file that ends in .bak"));
    }
    Ok(to)
}

fn choose(app: &App, args: &Setup, offers: &[Offer], terminal: Option<&Terminal>) -> Result<Chosen, Fault> {
    let name = match (&args.provider, terminal) {
        (Some(name), _) => name.clone(),
        (None, Some(terminal)) => {
            list(app, offers, "").map_err(|error| Fault::failed(error.to_string()))?;
            terminal.ask("provider", offers.first().map_or("", |offer| offer.name))?
        }
        (None, None) => {
            return Err(Fault::usage("which provider?")
                .hint("name it with --provider; `drover setup --list` shows them, and where their keys come from"));
        }
    };
    let offer = offers.iter().find(|offer| offer.name == name);
    if offer.is_none() && args.base_url.is_none() {
        let known: Vec<&str> = offers.iter().map(|offer| offer.name).collect();
        return Err(Fault::usage(format!("there is no provider {name:?}; those that are: {}", known.join(", ")))
            .hint("any other that speaks like OpenAI's needs its address: --base-url http://127.0.0.1:8000/v1"));
    }
    let usual = offer.and_then(|offer| offer.model.clone());
    let model = match (&args.model, usual, terminal) {
        (Some(model), ..) => model.clone(),
        (None, Some(usual), Some(terminal)) if name != "sim" => terminal.ask("model", &usual)?,
        (None, Some(usual), _) => usual,
        (None, None, Some(terminal)) => terminal.ask("model", "")?,
        (None, None, None) => return Err(Fault::usage("which model?").hint("name it with --model")),
    };
    if model.trim().is_empty() {
        return Err(Fault::usage("which model?").hint("name it with --model"));
    }
    let (nodes, why_nodes) = suggested_nodes();
    let max_nodes = args.max_nodes.unwrap_or(nodes);
    let mut pricing = BTreeMap::new();
    if let Some((input, output)) = args.price {
        let own =
            ModelPricing { input_tokens_usd_per_m: input, output_tokens_usd_per_m: output, ..ModelPricing::default() };
        pricing.insert(model.clone(), own);
    }
    Ok(Chosen {
        provider: ProviderSettings {
            name,
            model: Some(model),
            api_key_env: args.api_key_env.clone(),
            api_key_file: args.key_file.clone(),
            base_url: args.base_url.clone(),
            ..ProviderSettings::default()
        },
        pricing,
        max_nodes,
        why_nodes: if args.max_nodes.is_some() { "as asked".to_owned() } else { why_nodes },
        max_concurrent_api: args.max_concurrent_api.unwrap_or(AT_ONCE.min(max_nodes)),
        cap: if args.no_cap { None } else { Some(args.max_daily_spend.unwrap_or(CAP)) },
    })
}

/// What this machine is good for, and why.
fn suggested_nodes() -> (u32, String) {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let free = super::doctor::free_memory().unwrap_or(0);
    let nodes = setup::suggested_nodes(processors, free);
    (nodes, format!("{processors} processors, {:.1} GiB free", free as f64 / (1_u64 << 30) as f64))
}

async fn carry_out(app: &App, args: &Setup, mut plan: Plan, terminal: Option<&Terminal>) -> anyhow::Result<Exit> {
    let variables = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let provider = &mut plan.chosen.provider;
    let name = provider.name.clone();
    let mut given = None;
    if let Some(file) = &provider.api_key_file {
        provider.api_key_file = Some(std::path::absolute(file)?);
    }
    if args.key_stdin {
        given = Some(read_stdin_key()?);
    }
    let mut found = if given.is_some() {
        Ok(KeyFound::NotNeeded)
    } else {
        setup::find_key(provider, plan.keys.as_deref(), variables)
    };
    if let (Err(error), Some(terminal)) = (&found, terminal) {
        app.screen.note(&error.to_string());
        let page = setup::key_page(&name);
        if !page.is_empty() {
            app.screen.note(&format!("a key is made at {page}"));
        }
        given = terminal.ask_hidden("key (it is not shown)")?;
        if given.is_some() {
            found = Ok(KeyFound::NotNeeded);
        }
    }
    let mut found = found.map_err(|error| {
        let page = setup::key_page(&name);
        let from = if page.is_empty() { String::new() } else { format!("make a key at {page}, then ") };
        Fault::failed(error.to_string()).hint(format!(
            "{from}set the variable, or hand the key in: drover setup --provider {name} --key-stdin < FILE"
        ))
    })?;

    let probed = if args.no_check { None } else { Some(check(app, &plan, given.as_deref()).await?) };

    if let Some(key) = given {
        let usual = key_file(plan.keys.as_deref(), &name);
        let path = usual.ok_or_else(|| {
            Fault::failed(format!("there is no place for the key of {name:?}"))
                .hint("write it into a file of mode 0600 and name that with --key-file")
        })?;
        write::key(&path, &key)?;
        plan.chosen.provider.api_key_file = Some(path.clone());
        plan.chosen.provider.api_key_env = None;
        found = KeyFound::File(path);
    } else if let KeyFound::Variable(variable) = &found {
        plan.chosen.provider.api_key_env = Some(variable.clone());
    }
    let backup = write::configuration(&plan.to, &write::yaml(&plan.chosen, &plan.today), args.force)?;
    tell(app, args, &plan, &found, probed.as_ref(), backup)?;
    Ok(Exit::Done)
}

async fn check(app: &App, plan: &Plan, given: Option<&str>) -> Result<Probed, Fault> {
    let variables = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let Chosen { provider, pricing, cap, .. } = &plan.chosen;
    let dir = app.state()?.join("dispatcher").map_err(|error| Fault::failed(error.to_string()))?;
    let books = setup::Books { dir: &dir, cap: cap.and_then(Money::from_usd) };
    let spinner = app.screen.spinner("asking the provider once");
    let result = setup::probe(provider, pricing, given, plan.keys.as_deref(), Some(books), variables).await;
    drop(spinner);
    result.map_err(|error| {
        let model = provider.model.as_deref().unwrap_or_default();
        let message = format!("{} {model} does not work: {error}", provider.name);
        Fault::failed(format!("{message}; nothing was written")).hint(error.hint(&provider.name))
    })
}

fn read_stdin_key() -> Result<String, Fault> {
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::io::Read::take(std::io::stdin(), 16 << 10), &mut text)
        .map_err(|error| Fault::failed(format!("cannot read the key from standard input: {error}")))?;
    write::clean_key(&text)
}

fn per_million(price: &Price) -> String {
    let usd = |pico: u64| pico as f64 / 1e6;
    format!("{} USD per million tokens in, {} out", usd(price.input), usd(price.output))
}

/// What a person has to know about the model that was chosen.
fn cautions(plan: &Plan) -> Vec<String> {
    let Chosen { provider, pricing, cap, .. } = &plan.chosen;
    let model = provider.model.as_deref().unwrap_or_default();
    let mut said = Vec::new();
    if let Some(day) = setup::retired(&provider.name, model) {
        said.push(format!("{model} was to be switched off by its provider on {day}"));
    }
    if cap.is_some() && setup::price(pricing, &provider.name, model).is_none() {
        said.push(format!(
            "the price of {model} is not known, so no cap can hold and its tasks are refused: give it with --price IN:OUT (USD \
             per million tokens; 0:0 for a model of your own), or leave the cap out with --no-cap"
        ));
    }
    said
}

fn tell(
    app: &App,
    args: &Setup,
    plan: &Plan,
    found: &KeyFound,
    probed: Option<&Probed>,
    backup: Option<PathBuf>,
) -> std::io::Result<()> {
    let Chosen { provider, pricing, max_nodes, why_nodes, max_concurrent_api, cap } = &plan.chosen;
    let model = provider.model.as_deref().unwrap_or_default();
    let price = setup::price(pricing, &provider.name, model);
    let cautions = cautions(plan);
    let running = app.state().is_ok_and(|state| address_book::read(&state, DISPATCHER).is_some());
    if app.global.json {
        let check = probed.map_or(json!({"done": false}), |probed| {
            json!({
                "done": true, "took_ms": probed.took.as_millis() as u64, "model": probed.model, "note": probed.but,
                "cost_usd": probed.cost.map(drover_dispatcher::core::Money::usd),
            })
        });
        let document = json!({
            "ok": true, "config": plan.to, "backup": backup, "provider": provider.name, "model": model,
            "base_url": provider.base_url, "simulated": provider.name == "sim" && provider.base_url.is_none(),
            "key": {"from": found.to_string(), "page": setup::key_page(&provider.name)}, "check": check,
            "limits": {"max_nodes": max_nodes, "max_concurrent_api": max_concurrent_api, "why": why_nodes},
            "cost": {"max_daily_spend": cap, "priced": price.is_some()}, "warnings": cautions,
            "restart_needed": running,
        });
        return app.screen.out(&document.to_string());
    }
    let out = |name: &str, text: &str| app.screen.out(&format!("{name:<9} {text}"));
    let price = price.map_or_else(|| "price not known".to_owned(), |price| per_million(&price));
    out("provider", &format!("{} {model} ({price})", provider.name))?;
    out("key", &found.to_string())?;
    out(
        "checked",
        &match probed {
            None => "no: --no-check".to_owned(),
            Some(probed) => {
                let cost = probed
                    .cost
                    .map_or_else(|| "cost not known".to_owned(), |cost| format!("{cost} USD, not in the ledger"));
                let but = probed.but.as_ref().map_or_else(String::new, |but| format!("; the key works, but: {but}"));
                format!("one call, {} ms, {cost}{but}", probed.took.as_millis())
            }
        },
    )?;
    let cap = cap.map_or_else(|| "no cap on a day's spending".to_owned(), |cap| format!("at most {cap:.2} USD a day"));
    out("limits", &format!("{max_nodes} nodes ({why_nodes}), {max_concurrent_api} calls at once, {cap}"))?;
    out("written", &plan.to.display().to_string())?;
    for caution in cautions {
        app.screen.note(&caution);
    }
    if let Some(backup) = backup {
        app.screen.note(&format!("what was there is {}", backup.display()));
    }
    if running {
        app.screen.note(
            "the dispatcher runs with what it was started with: drover down, and the next command starts it anew",
        );
    }
    let with = if args.to.is_some() { format!(" --config {}", plan.to.display()) } else { String::new() };
    app.screen.note(&format!(
        "next: drover{with} ask \"Research the top 5 AI companies and compare their products\"; drover doctor looks again"
    ));
    Ok(())
}

fn list(app: &App, offers: &[Offer], date: &str) -> std::io::Result<()> {
    if app.global.json {
        let one = |offer: &Offer| -> Value {
            let usd = |pico: u64| pico as f64 / 1e6;
            json!({
                "provider": offer.name, "about": offer.about, "model": offer.model, "key_page": offer.key_page,
                "key_variable": offer.key_variable,
                "input_usd_per_m": offer.price.map(|price| usd(price.input)),
                "output_usd_per_m": offer.price.map(|price| usd(price.output)),
            })
        };
        let document = json!({"providers": offers.iter().map(one).collect::<Vec<_>>(), "prices_of": date});
        return app.screen.out(&document.to_string());
    }
    let mut table = Table::new(&["PROVIDER", "MODEL", "USD/M IN", "USD/M OUT", "KEY IN", "KEYS ARE MADE AT", "NOTES"]);
    for offer in offers {
        let usd = |pico: Option<u64>| pico.map_or_else(String::new, |pico| format!("{}", pico as f64 / 1e6));
        let cells = [
            offer.name.to_owned(),
            offer.model.clone().unwrap_or_default(),
            usd(offer.price.map(|price| price.input)),
            usd(offer.price.map(|price| price.output)),
            offer.key_variable.unwrap_or_default().to_owned(),
            offer.key_page.to_owned(),
            offer.about.to_owned(),
        ];
        table.row(cells.iter().map(|text| Cell::from(text.as_str())).collect());
    }
    app.screen.table(&table)?;
    if !date.is_empty() {
        app.screen.note(&format!(
            "prices are unverified defaults of {date}; model_pricing in the configuration sets your own"
        ));
    }
    Ok(())
}
