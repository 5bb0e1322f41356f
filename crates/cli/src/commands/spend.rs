//! `drover spend`: what model calls cost, by day, and what is left of the day's cap.

use drover_proto::dispatch as pb;
use serde_json::{Value, json};

use crate::app::App;
use crate::args::Spend;
use crate::dispatcher::{self, usd};
use crate::fault::Exit;
use crate::render::table::{Cell, Table};

pub(super) async fn run(app: &App, args: &Spend) -> anyhow::Result<Exit> {
    let mut rpc = dispatcher::connect(app).await?;
    let answer = dispatcher::unary(rpc.get_spend(pb::GetSpendRequest { days: args.days })).await?;
    if app.global.json {
        app.screen.out(&document(&answer).to_string())?;
        return Ok(Exit::Done);
    }
    if answer.days.is_empty() {
        app.screen.note("nothing was spent yet");
    } else {
        app.screen.table(&table(&answer))?;
    }
    app.screen.out(&said(&answer))?;
    Ok(Exit::Done)
}

/// What counts today, in a sentence.
fn said(answer: &pb::GetSpendResponse) -> String {
    let counted = usd(answer.counted_pico_usd);
    let today = format!("{} ({})", answer.today, answer.timezone);
    match answer.cap_pico_usd {
        Some(cap) => {
            let left = usd(cap.saturating_sub(answer.counted_pico_usd));
            format!("today, {today}: {counted:.6} USD of {:.2} USD count, {left:.6} USD are left", usd(cap))
        }
        None => {
            format!("today, {today}: {counted:.6} USD; there is no cap, node_scaling.cost.max_daily_spend sets one")
        }
    }
}

fn table(answer: &pb::GetSpendResponse) -> Table {
    let mut table = Table::new(&["DAY", "PROVIDER", "MODEL", "CALLS", "INPUT", "OUTPUT", "USD"]);
    for day in &answer.days {
        for line in &day.spent {
            let cells = [
                day.day.clone(),
                line.provider.clone(),
                line.model.clone(),
                line.calls.to_string(),
                line.input_tokens.to_string(),
                line.output_tokens.to_string(),
                format!("{:.6}", usd(line.cost_pico_usd)),
            ];
            table.row(cells.iter().map(|text| Cell::from(text.as_str())).collect());
        }
        if day.set_aside_pico_usd > 0 {
            let (day, amount) = (day.day.clone(), format!("{:.6}", usd(day.set_aside_pico_usd)));
            let cells = [day.as_str(), "set aside, or lost in a crash", "", "", "", "", amount.as_str()];
            table.row(cells.iter().map(|text| Cell::from(*text)).collect());
        }
    }
    table
}

fn document(answer: &pb::GetSpendResponse) -> Value {
    let line = |line: &pb::SpentOn| {
        json!({
            "provider": line.provider,
            "model": line.model,
            "calls": line.calls,
            "input_tokens": line.input_tokens,
            "output_tokens": line.output_tokens,
            "cost_usd": usd(line.cost_pico_usd),
            "estimated_usd": usd(line.estimated_pico_usd),
        })
    };
    let days = answer.days.iter().map(|day| {
        let cost: u64 = day.spent.iter().map(|line| line.cost_pico_usd).sum();
        json!({
            "day": day.day,
            "cost_usd": usd(cost),
            "set_aside_usd": usd(day.set_aside_pico_usd),
            "spent": day.spent.iter().map(line).collect::<Vec<_>>(),
        })
    });
    json!({
        "today": answer.today,
        "timezone": answer.timezone,
        "counted_usd": usd(answer.counted_pico_usd),
        "cap_usd": answer.cap_pico_usd.map(usd),
        "left_usd": answer.cap_pico_usd.map(|cap| usd(cap.saturating_sub(answer.counted_pico_usd))),
        "days": days.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_counts_and_what_is_left() {
        let mut answer = pb::GetSpendResponse {
            today: "2026-11-21".into(),
            timezone: "UTC".into(),
            counted_pico_usd: 1_250_000_000_000,
            cap_pico_usd: Some(5_000_000_000_000),
            ..Default::default()
        };
        assert_eq!(said(&answer), "today, 2026-11-21 (UTC): 1.250000 USD of 5.00 USD count, 3.750000 USD are left");
        let document = document(&answer);
        assert_eq!((document["counted_usd"].as_f64(), document["left_usd"].as_f64()), (Some(1.25), Some(3.75)));
        answer.cap_pico_usd = None;
        assert!(said(&answer).contains("max_daily_spend"));
    }
}
