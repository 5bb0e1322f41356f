//! What the program reads of the web: `fetch`, `research`, `ask`, against a web server and a search engine of the test, with a
//! provider that only pretends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener};

use serde_json::Value;

use crate::real::Home;

/// Serves each request on a connection of its own; `answer` makes status, content type and body of a path.
fn serve(answer: impl Fn(&str) -> (u16, &'static str, String) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let first = lines.next().unwrap_or_default();
            while lines.next().is_some_and(|line| !line.is_empty()) {}
            let (status, kind, body) = answer(first.split(' ').nth(1).unwrap_or_default());
            let head = format!("HTTP/1.1 {status} x\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n", body.len());
            let _ = stream.write_all(format!("{head}connection: close\r\n\r\n{body}").as_bytes());
        }
    });
    addr
}

/// A site about animals, and an engine that finds its pages. The engine knows nothing of goats, and the page on yaks is gone.
fn animals(path: &str) -> (u16, &'static str, String) {
    let page = |name: &str| {
        format!(
            "<title>All about {name}</title><h1>{name}</h1><p>{}",
            format!("The {name} page, with facts. ").repeat(10)
        )
    };
    match path {
        "/robots.txt" => (200, "text/plain", "user-agent: *\ndisallow: /private\n".to_owned()),
        "/huge" => (200, "text/plain", "x".repeat(5000)),
        "/picture" => (200, "image/png", "PNG".to_owned()),
        "/yaks" => (404, "text/html", String::new()),
        _ if path.starts_with("/search?") => {
            let name = ["sheep", "yaks"].into_iter().find(|name| path.contains(name));
            let hits = name.map_or(String::new(), |name| {
                format!(r#"{{"url": "http://HOST/{name}", "title": "{name}", "content": "A line about {name}."}}"#)
            });
            (200, "application/json", format!(r#"{{"results": [{hits}]}}"#))
        }
        _ => (200, "text/html", page(path.trim_start_matches('/'))),
    }
}

/// A home whose dispatcher pretends, and that may read from the site.
fn home(site: SocketAddr, more: &str) -> Home {
    let home = Home::new();
    let config = format!(
        "node_scaling:\n  listen: 127.0.0.1:0\n  limits: {{max_nodes: 4, max_concurrent_api: 4}}\n  sim: {{latency: 5ms}}\n  \
         fetch: {{allow: [\"{site}\"], max_bytes: 4000, timeout: 20s}}\n{more}"
    );
    std::fs::write(home.path().join("drover.yaml"), config).unwrap();
    home
}

/// The site, with its own address in what its engine finds.
fn site() -> SocketAddr {
    let known = std::sync::Arc::new(std::sync::OnceLock::<SocketAddr>::new());
    let own = std::sync::Arc::clone(&known);
    let addr = serve(move |path| {
        let (status, kind, body) = animals(path);
        let host = own.get().map(ToString::to_string).unwrap_or_default();
        (status, kind, body.replace("HOST", &host))
    });
    known.set(addr).unwrap();
    addr
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[test]
fn fetch_shows_what_a_worker_sees_or_why_it_does_not_look() {
    let site = site();
    let home = home(site, "");
    let url = |path: &str| format!("http://{site}{path}");
    let (code, out, err) = home.run(&["fetch", &url("/sheep")]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.starts_with("# All about sheep\n") && out.contains("The sheep page, with facts.") && !out.contains('<'),
        "{out}"
    );
    assert!(err.contains("text/html"), "{err}");
    let page = home.json(&["fetch", &url("/sheep")]);
    assert_eq!((&page["ok"], &page["url"], &page["truncated"]), (&true.into(), &url("/sheep").into(), &false.into()));
    assert_eq!(page["sha256"].as_str().unwrap().len(), 64);
    let huge = home.json(&["fetch", &url("/huge")]);
    assert_eq!((&huge["chars"], &huge["truncated"]), (&4000.into(), &true.into()), "max_bytes");

    for (url, code, hint) in [
        (url("/private/x"), "robots", "respect it"),
        (url("/picture"), "content_type", "HTML"),
        ("http://169.254.169.254/latest/meta-data/".to_owned(), "private_address", "node_scaling.fetch.allow"),
        (format!("http://[::ffff:127.0.0.1]:{}/", site.port()), "private_address", "node_scaling.fetch.allow"),
        ("http://metadata.google.internal/".to_owned(), "local_name", "node_scaling.fetch.allow"),
        ("file:///etc/passwd".to_owned(), "scheme", "https://"),
    ] {
        let (exit, out, _) = home.run(&["fetch", &url, "--json"]);
        let document = &lines(&out)[0];
        assert_eq!(
            (exit, document["ok"].as_bool(), document["code"].as_str()),
            (Some(1), Some(false), Some(code)),
            "{url}"
        );
        assert!(document["hint"].as_str().unwrap().contains(hint), "{document}");
        let (exit, out, err) = home.run(&["fetch", &url]);
        assert_eq!((exit, out.as_str()), (Some(1), ""), "{url}");
        assert!(err.contains(document["error"].as_str().unwrap()) && err.contains(hint), "{err}");
    }
    assert!(home.processes().is_empty(), "it needs no daemon");

    std::fs::write(home.path().join("bad.yaml"), "node_scaling: {fetch: {allow: [\"http://x/\"]}}\n").unwrap();
    let (code, _, err) = home.run(&["fetch", &url("/sheep"), "--config", "bad.yaml"]);
    assert!(code == Some(78) && err.contains("node_scaling.fetch.allow"), "{err}");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap();
    let brief = format!("node_scaling: {{fetch: {{allow: [\"{silent}\"], timeout: 50ms}}}}\n");
    std::fs::write(home.path().join("brief.yaml"), brief).unwrap();
    let (_, out, _) = home.run(&["fetch", &format!("http://{silent}/"), "--config", "brief.yaml", "--json"]);
    assert!(["timeout", "transport"].contains(&lines(&out)[0]["code"].as_str().unwrap()), "{out}");
}

#[test]
fn research_answers_in_the_order_of_the_subjects_and_says_what_each_rests_on() {
    let site = site();
    let home = home(site, &format!("  search: {{backend: searxng, base_url: \"http://{site}\"}}\n"));
    let (code, out, err) = home.run(&["research", "sheep", "goats", "yaks", "sheep", "--topic", "wool", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let lines = lines(&out);
    let [sheep, goats, yaks, again, summary] = lines.as_slice() else { panic!("{out}") };
    let brief = |line: &Value| format!("{} {} {} {}", line["id"], line["subject"], line["status"], line["grounding"]);
    assert_eq!(brief(sheep), r#""1" "sheep" "succeeded" "page""#);
    assert_eq!(brief(goats), r#""2" "goats" "succeeded" "none""#);
    assert_eq!(brief(yaks), r#""3" "yaks" "succeeded" "snippets""#);
    assert_eq!(brief(again), r#""4" "sheep" "succeeded" "page""#);
    let source = &sheep["sources"][0];
    assert_eq!(source["url"], format!("http://{site}/sheep"));
    assert_eq!(
        source["sha256"],
        home.json(&["fetch", &format!("http://{site}/sheep")])["sha256"],
        "as `fetch` shows it"
    );
    assert_eq!((&goats["grounded"], goats["sources"].as_array().unwrap().len()), (&false.into(), 0));
    assert_eq!(goats["misses"][0]["why"], "no hits");
    assert_eq!((&yaks["misses"][0]["step"], &yaks["simulated"]), (&"fetch".into(), &true.into()));
    let summary = &summary["summary"];
    assert_eq!((&summary["tasks"], &summary["grounded"], &summary["failed"]), (&4.into(), &3.into(), &0.into()));
    assert!(summary["speedup"].as_f64().unwrap() <= 4.0, "{summary}");

    let (code, out, err) = home.run(&["research", "goats", "yaks"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("== goats ==") && out.contains("[ungrounded: no hits]"), "{out}");
    assert!(out.contains(&format!("[source http://{site}/yaks")) && out.contains("not on the pages"), "{out}");
    assert!(err.contains("simulated") && err.contains("2 of 2 answered, 1 of them grounded"), "{err}");
    let (code, _, err) = home.run(&["research", " "]);
    assert!(code == Some(2) && err.contains("subject 1 is empty"), "{err}");
}

#[test]
fn research_that_was_stopped_goes_on_without_asking_again() {
    let site = site();
    let counted = std::sync::Arc::new(std::sync::Mutex::new(Vec::<String>::new()));
    let counting = std::sync::Arc::clone(&counted);
    // A second door to the same site, which counts.
    let door = serve(move |path| {
        counting.lock().unwrap().push(path.to_owned());
        let (status, kind, body) = animals(path);
        (status, kind, body.replace("HOST", &site.to_string()))
    });
    let home = home(site, &format!("  search: {{backend: searxng, base_url: \"http://{door}\"}}\n"));
    let (code, out, err) = home.run(&["research", "sheep", "goats", "sheep", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let run = lines(&out)[3]["summary"]["run_id"].as_str().unwrap().to_owned();
    assert!(err.contains(&format!("--resume {run}")), "{err}");
    let asked = counted.lock().unwrap().len();
    assert_eq!(asked, 3, "one search for each: {:?}", counted.lock().unwrap());
    // In another order, and with one more.
    let (code, out, err) = home.run(&["research", "goats", "sheep", "sheep", "yaks", "--json", "--resume", &run]);
    assert_eq!(code, Some(0), "{err}");
    let again = lines(&out);
    let brief = |line: &Value| format!("{} {} {}", line["subject"], line["status"], line["grounding"]);
    assert_eq!(brief(&again[0]), r#""goats" "succeeded" "none""#);
    assert_eq!(brief(&again[1]), r#""sheep" "succeeded" "page""#);
    assert_eq!(counted.lock().unwrap().len(), asked + 1, "only what is new is searched for");
    let request = "Compare the three oldest breeds of sheep";
    let (code, out, err) = home.run(&["ask", request, "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let run = lines(&out).last().unwrap()["summary"]["run_id"].as_str().unwrap().to_owned();
    let asked = counted.lock().unwrap().len();
    let (code, out_again, err) = home.run(&["ask", request, "--json", "--resume", &run]);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(counted.lock().unwrap().len(), asked, "nothing is searched for again");
    let answer = |out: &str| lines(out).iter().find(|line| line["answer"].is_string()).unwrap()["answer"].clone();
    assert_eq!(answer(&out_again), answer(&out));
}

#[test]
fn waiting_for_a_turn_is_no_work_that_was_saved() {
    let home = Home::new();
    // Eight may be on their way, and one is asked about at a time: nothing is faster than one after another.
    let config = "node_scaling:\n  listen: 127.0.0.1:0\n  limits: {max_nodes: 8, max_concurrent_api: 1, hedge: false}\n  \
                  sim: {latency: 100ms}\n";
    std::fs::write(home.path().join("drover.yaml"), config).unwrap();
    let (code, out, err) = home.run(&["research", "a", "b", "c", "d", "e", "f", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let summary = lines(&out).pop().unwrap()["summary"].clone();
    let speedup = summary["speedup"].as_f64().unwrap();
    assert!(speedup > 0.0 && speedup < 1.1, "{summary}");
}

#[test]
fn ask_shows_the_plan_and_its_price_and_answers_from_the_findings() {
    let site = site();
    let home = home(site, "");
    let request = "Research the top 5 AI companies and compare their products";
    let (code, out, err) = home.run(&["ask", request, "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let lines = lines(&out);
    assert_eq!(lines.len(), 8, "a plan, five findings, an answer, a summary: {out}");
    let plan = &lines[0]["plan"];
    assert_eq!((plan["subjects"].as_array().unwrap().len(), &plan["calls"]), (5, &6.into()));
    let phases: Vec<&Value> = plan["phases"].as_array().unwrap().iter().map(|phase| &phase["kind"]).collect();
    assert_eq!(phases, ["search", "fetch", "analyze"]);
    assert_eq!(
        (&plan["worst_case_usd"], &plan["simulated"], &plan["searches"]),
        (&0.0.into(), &true.into(), &0.into())
    );
    for (nth, finding) in lines[1..6].iter().enumerate() {
        assert_eq!((&finding["subject"], &finding["grounded"]), (&plan["subjects"][nth], &false.into()));
        assert!(finding["misses"][0]["why"].as_str().unwrap().contains("search is off"), "{finding}");
    }
    assert_eq!((lines[6]["ungrounded"].as_array().unwrap().len(), &lines[6]["simulated"]), (5, &true.into()));
    assert!(!lines[6]["answer"].as_str().unwrap().is_empty());
    assert_eq!(lines[7]["summary"]["succeeded"], 5);

    let (code, out, err) = home.run(&["ask", request]);
    assert_eq!(code, Some(0), "{err}");
    for said in [
        "search is off",
        "plan, simulated: AI companies 1",
        "phases of each subject: search, fetch, analyze",
        "at most 0 searches",
        "simulated",
        "resting on no source",
    ] {
        assert!(err.contains(said), "{said}: {err}");
    }
    assert!(!out.trim().is_empty());
    let (code, out, err) = home.run(&["ask", request, "--dry-run"]);
    assert!(code == Some(0) && out.is_empty() && err.contains("plan"), "{out} {err}");
    let (_, _, err) = home.run(&["ask", request, "--dry-run", "--barrier"]);
    assert!(err.contains("all together: fetch, all together: analyze"), "{err}");
    let (code, _, err) = home.run(&["ask", "  "]);
    assert!(code == Some(2) && err.contains("empty"), "{err}");

    // An engine that cannot be asked is told with every answer that rests on nothing because of it.
    home.run(&["down"]);
    let config = "node_scaling: {listen: 127.0.0.1:0, sim: {latency: 5ms}, cost: {max_daily_spend: 1}, \
                  search: {backend: brave, api_key_env: K}}\n";
    std::fs::write(home.path().join("capped.yaml"), config).unwrap();
    let (code, out, err) = home.run(&["research", "sheep", "--config", "capped.yaml", "--json"]);
    assert!(code == Some(0) && out.contains("variable K") && out.contains("\"grounded\":false"), "{out}{err}");
}
