//! `drover ask`: a request in plain words, planned, carried out and summed up.

use std::sync::Arc;
use std::time::Instant;

use drover_config::{NodeScalingConfig, ProviderSettings};
use drover_dispatcher::coordinator::{AskError, Coordinator, Estimate, Plan, Planned, Prices, estimate, token_prices};
use drover_dispatcher::core::Money;
use drover_dispatcher::research::{Outcome, Phase};
use drover_dispatcher::search::worst_case_pico_usd;
use drover_dispatcher::{Configured, setup};
use serde_json::json;

use super::research::{InOrder, RunName, Summary, Tools, hold, note, tell};
use crate::app::App;
use crate::args::{Ask, WhoseModel};
use crate::fault::{Exit, Fault};

pub(super) async fn run(app: &App, args: &Ask) -> anyhow::Result<Exit> {
    let request = super::text_or_stdin(&args.request)?;
    let tools = Tools::of(app)?;
    let thinker = thinker(&tools.configured.scaling, &args.whose);
    // The coordinator may be another model than the workers', so it has a run of its own.
    let run = RunName::of(args.resume.as_deref());
    let beside = run.of_coordinator();
    let (thinking, thinking_said) = tools.open(app, "drover ask: coordinator", &thinker, &beside).await?;
    let (working, working_said) = tools.open(app, "drover ask", &args.whose, &run).await?;
    run.tell(app);
    tools.remark(app);
    let began = Instant::now();
    let coordinator = Coordinator::new(Arc::clone(&thinking) as _);
    let work = async {
        let result = carry_out(app, args, &request, &tools, &coordinator, &working, (&run, began)).await;
        working.close();
        thinking.close();
        result
    };
    let (result, thought, worked) =
        tokio::join!(work, thinking_said.listen(|_| ()), working_said.listen(|response| note(app, &response)));
    let exit = result?;
    for ended in [thought, worked] {
        ended.map_err(|status| Fault::of_status(&status))?;
    }
    Ok(exit)
}

async fn carry_out(
    app: &App,
    args: &Ask,
    request: &str,
    tools: &Tools,
    coordinator: &Coordinator,
    working: &Arc<drover_dispatcher::research::Remote>,
    (run, began): (&RunName, Instant),
) -> anyhow::Result<Exit> {
    let spinner = app.screen.spinner("planning");
    let Planned { mut plan, told } = coordinator.plan(request).await.map_err(|error| fault(&error))?;
    drop(spinner);
    if args.barrier {
        hold(&mut plan.phases);
    }
    let prices = prices(&tools.configured, &args.whose);
    let estimate = estimate(request, &plan, &tools.settings, tools.searching(), &prices);
    show_plan(app, &plan, &estimate, told.simulated)?;
    if args.dry_run {
        return Ok(Exit::Done);
    }
    let bar = app.screen.bar(plan.subjects.len() as u64, "research");
    let before = Instant::now();
    let mut shown = InOrder::new(app);
    // People want the answer; what it was made of is for scripts and for --findings.
    let show = app.global.json || args.findings;
    let (mut count, mut cost) = (0, 0.0);
    let findings = tools
        .researcher(working)
        .run(&plan.research(), |finding| {
            count += 1;
            cost += Money::from_pico(finding.cost_pico_usd).usd();
            tell(&bar, count, plan.subjects.len(), before, cost);
            if show {
                shown.add(finding);
            }
        })
        .await;
    let researching = before.elapsed();
    drop(bar);
    shown.result?;
    let spinner = app.screen.spinner("putting the findings together");
    let answer = coordinator.synthesize(request, &plan, &findings).await;
    drop(spinner);
    let wall = began.elapsed();
    let mut summary = Summary::of(&findings, wall, wall.saturating_sub(researching), tools.settings.width);
    summary.cost = summary.cost + Money::from_pico(told.cost_pico_usd) + Money::from_pico(answer.cost_pico_usd);
    let (text, why) = match &answer.outcome {
        Outcome::Answered(text) => (Some(text), None),
        Outcome::Blocked(why) | Outcome::Failed(why) => (None, Some(why)),
    };
    if app.global.json {
        let ungrounded: Vec<&str> =
            findings.iter().filter(|finding| !finding.is_grounded()).map(|finding| finding.subject.as_str()).collect();
        let document = json!({
            "answer": text, "error": why, "ungrounded": ungrounded, "provider": answer.provider, "model": answer.model,
            "simulated": answer.simulated,
        });
        app.screen.out(&document.to_string())?;
    } else if let Some(text) = text {
        app.screen.out(text.trim_end())?;
        let ungrounded: Vec<&str> =
            findings.iter().filter(|finding| !finding.is_grounded()).map(|finding| finding.subject.as_str()).collect();
        if !ungrounded.is_empty() {
            app.screen.note(&format!("resting on no source: {}", ungrounded.join(", ")));
        }
    }
    summary.show(app, run)?;
    match why {
        Some(why) => Err(Fault::failed(format!("the findings could not be put together: {why}"))
            .hint("`drover ask --findings` shows them as they are")
            .into()),
        None => Ok(Exit::Done),
    }
}

/// Whose model plans and sums up: what is asked for, else the configured coordinator, else the one that works.
fn thinker(scaling: &NodeScalingConfig, asked: &WhoseModel) -> WhoseModel {
    match &scaling.coordinator {
        Some(coordinator) if asked.provider.is_none() && asked.model.is_none() => {
            WhoseModel { provider: Some(coordinator.name.clone()), model: coordinator.model.clone() }
        }
        _ => asked.clone(),
    }
}

/// What the parts cost, as far as that is known, of those who will be asked.
fn prices(configured: &Configured, asked: &WhoseModel) -> Prices {
    let Configured { scaling, pricing, .. } = configured;
    let price = |whose: &WhoseModel| {
        // As the dispatcher understands it: the name of a provider, of a model, or of both, each else as configured.
        let known = std::iter::once(&scaling.provider).chain(&scaling.fallback).chain(&scaling.coordinator);
        let fits = |provider: &&ProviderSettings| {
            whose.provider.as_ref().is_none_or(|name| provider.name == *name)
                && whose.model.as_ref().is_none_or(|model| provider.model.as_ref() == Some(model))
        };
        let found = known.clone().find(fits);
        let name = found.map(|found| found.name.clone()).or_else(|| whose.provider.clone());
        let name = name.unwrap_or_else(|| scaling.provider.name.clone());
        let of_name = || known.clone().find(|provider| provider.name == name).and_then(|found| found.model.clone());
        let model = whose.model.clone().or_else(|| found.and_then(|found| found.model.clone())).or_else(of_name);
        token_prices(pricing, &name, model.as_deref().unwrap_or(&name))
    };
    let (worker, coordinator) = (price(asked), price(&thinker(scaling, asked)));
    Prices {
        worker_input: worker.map(|price| price.0),
        worker_output: worker.map(|price| price.1),
        coordinator_input: coordinator.map(|price| price.0),
        coordinator_output: coordinator.map(|price| price.1),
        search: worst_case_pico_usd(scaling, |provider, model| setup::price(pricing, provider, model)),
    }
}

fn show_plan(app: &App, plan: &Plan, estimate: &Estimate, simulated: bool) -> std::io::Result<()> {
    let cost = estimate.cost_pico_usd.map(Money::from_pico);
    if app.global.json {
        let document = json!({"plan": {
            "subjects": plan.subjects, "topic": plan.topic, "phases": plan.phases, "synthesis": plan.synthesis, "simulated": simulated,
            "searches": estimate.searches, "pages": estimate.pages, "calls": estimate.calls,
            "worst_case_usd": cost.map(Money::usd),
        }});
        return app.screen.out(&document.to_string());
    }
    let about = if plan.topic.is_empty() { String::new() } else { format!(" ({})", plan.topic) };
    let made_up = if simulated { ", simulated" } else { "" };
    app.screen.note(&format!("plan{made_up}: {}{about}", plan.subjects.join("; ")));
    app.screen.note(&format!("phases of each subject: {}", phases(&plan.phases)));
    let cost = cost
        .map_or_else(|| "of unknown cost: not every price is known".to_owned(), |cost| format!("at most {cost} USD"));
    app.screen.note(&format!(
        "at most {} searches, {} pages, {} calls to models, {cost}",
        estimate.searches, estimate.pages, estimate.calls
    ));
    Ok(())
}

/// The phases in a line, with what is asked in them and where all wait for each other.
fn phases(phases: &[Phase]) -> String {
    let one = |phase: &Phase| {
        let asked = if phase.prompt.is_empty() { String::new() } else { format!(" ({})", phase.prompt) };
        let wait = if phase.barrier { "all together: " } else { "" };
        format!("{wait}{}{asked}", phase.kind.kind().as_str())
    };
    phases.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn fault(error: &AskError) -> Fault {
    let message = error.to_string();
    match error {
        AskError::Empty | AskError::TooLong(_) => {
            Fault::usage(message).hint("say in a sentence or two what is to be found out about whom")
        }
        AskError::Model(_) => Fault::failed(message)
            .hint("`drover doctor` looks at the provider; another can plan: node_scaling.coordinator"),
        AskError::Plan(_) => Fault::failed(message).hint(
            "say it in other words, let a stronger model plan (node_scaling.coordinator), or use `drover research`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use drover_config::ModelPricing;

    use super::*;

    #[test]
    fn what_is_estimated_is_what_those_cost_who_will_be_asked() {
        let provider = |name: &str, model: &str| ProviderSettings {
            name: name.into(),
            model: Some(model.into()),
            ..ProviderSettings::default()
        };
        let scaling = NodeScalingConfig {
            provider: provider("own", "small"),
            fallback: vec![provider("other", "middle")],
            coordinator: Some(provider("own", "large")),
            ..NodeScalingConfig::default()
        };
        let price = |usd: f64| ModelPricing { input_tokens_usd_per_m: usd, ..ModelPricing::default() };
        let pricing: BTreeMap<String, ModelPricing> =
            [("small", 1.0), ("middle", 2.0), ("large", 3.0)].map(|(name, usd)| (name.to_owned(), price(usd))).into();
        let configured = Configured { scaling, pricing, source: Some("x".into()) };
        let of = |provider: Option<&str>, model: Option<&str>| {
            let asked = WhoseModel { provider: provider.map(str::to_owned), model: model.map(str::to_owned) };
            let prices = prices(&configured, &asked);
            (prices.worker_input.map(|pico| pico / 1_000_000), prices.coordinator_input.map(|pico| pico / 1_000_000))
        };
        assert_eq!(of(None, None), (Some(1), Some(3)));
        assert_eq!(of(Some("other"), None), (Some(2), Some(2)));
        assert_eq!(of(None, Some("large")), (Some(3), Some(3)));
        assert_eq!(of(Some("other"), Some("small")), (Some(1), Some(1)));
        assert_eq!(of(Some("sim"), None), (Some(0), Some(0)));
        assert_eq!(of(Some("other"), Some("unheard-of")), (None, None));
    }
}
