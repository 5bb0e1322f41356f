//! The fetcher against a server on loopback: what it reads, what it respects, and several hundred URLs that try to reach a port
//! which nothing may reach.

use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use super::loopback::{Asked, Loopback, Said};
use super::{FetchError, FetchSettings, Fetcher, Lookup, sha256};

/// Names of the tests. Nothing is looked up in the world.
#[derive(Default)]
struct Names {
    asked: AtomicUsize,
}

#[async_trait]
impl Lookup for Names {
    async fn addresses(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        let nth = self.asked.fetch_add(1, Ordering::SeqCst);
        let spelt: &[&str] = match host.trim_end_matches('.') {
            "listed.example.com" => &["127.0.0.1"],
            // Each spells the address that it leads to.
            name if name.ends_with(".v4.example.com") => {
                let addr = name.trim_end_matches(".v4.example.com").replace('-', ".");
                return Ok(vec![addr.parse().unwrap()]);
            }
            "six.example.com" => &["::1"],
            "mapped.example.com" => &["::ffff:127.0.0.1"],
            "translated.example.com" => &["64:ff9b::7f00:1"],
            "compatible.example.com" => &["::127.0.0.1"],
            "mixed.example.com" => &["192.0.43.7", "127.0.0.1"],
            "mixed6.example.com" => &["2606:4700::1", "::1"],
            // Another answer each time, all of them inside.
            "rebind.example.com" => [&["127.0.0.1"], &["10.0.0.1"], &["0.0.0.0"]][nth % 3],
            "none.example.com" => &[],
            _ => return Err(io::Error::other("no such name")),
        };
        Ok(spelt.iter().map(|addr| addr.parse().unwrap()).collect())
    }
}

/// Listens on every address of this machine and counts who comes.
struct Canary {
    port: u16,
    visits: Arc<AtomicUsize>,
}

impl Canary {
    fn listen() -> Self {
        let listener = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0")).unwrap();
        let canary = Self { port: listener.local_addr().unwrap().port(), visits: Arc::default() };
        let visits = Arc::clone(&canary.visits);
        std::thread::spawn(move || {
            for visitor in listener.incoming() {
                visits.fetch_add(1, Ordering::SeqCst);
                drop(visitor);
            }
        });
        canary
    }

    fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }

    /// Returns when it has counted so many visits.
    async fn has_counted(&self, visits: usize) {
        for _ in 0..3000 {
            if self.visits() >= visits {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the canary saw {} of {visits} visits", self.visits());
    }
}

fn fetcher(allow: &[String]) -> Fetcher {
    let settings = FetchSettings { allow: allow.to_vec(), ..FetchSettings::default() };
    let names: Arc<dyn Lookup> = Arc::new(Names::default());
    Fetcher::with_lookup(settings, &names).unwrap()
}

/// A fetcher that may read from this server.
fn fetcher_for(server: &Loopback) -> Fetcher {
    fetcher(&[server.addr.to_string()])
}

/// Hosts that lead inside, in every spelling that a reader of URLs, a resolver, or a clumsy program might understand.
fn hosts() -> Vec<String> {
    let mut hosts: Vec<String> = [
        // Loopback.
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "127.255.255.254",
        "127.0.0.1.",
        "2130706433",
        "0x7f000001",
        "0x7F.1",
        "0x7f.0x0.0x0.0x1",
        "017700000001",
        "0177.0.0.1",
        "0177.0.0.01",
        "0000177.0.0.1",
        "127.0x1",
        "127.000.000.001",
        "%31%32%37.0.0.1",
        "127%2e0%2e0%2e1",
        "127。0。0。1",
        "127．0．0．1",
        "①②⑦.⓪.⓪.①",
        "１２７.０.０.１",
        "0",
        "0.0.0.0",
        "0x0",
        "00",
        "0.0",
        "0.1.2.3",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "localhost..",
        "a.localhost",
        "ⓛocalhost",
        "loc%61lhost",
        "localhost.localdomain",
        "ip6-localhost",
        // IPv6.
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000::0001]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::ffff:0:7f00:1]",
        "[::127.0.0.1]",
        "[::7f00:1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
        "[2002:7f00:0001::1]",
        "[2001:0:7f00:1::1]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00::1]",
        "[fd00:ec2::254]",
        "[fec0::1]",
        "[ff02::1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:10.0.0.1]",
        "[2a00::5efe:127.0.0.1]",
        "[2001:db8::1]",
        "[100::1]",
        "[fe80::1%25lo]",
        // Private, shared, link-local, multicast, reserved.
        "10.0.0.1",
        "10.255.255.255",
        "0xa000001",
        "012.0.0.1",
        "167772161",
        "172.16.0.1",
        "172.31.255.255",
        "0xac100001",
        "192.168.0.1",
        "192.168.1.1.",
        "0xc0a80101",
        "3232235777",
        "192.168.257",
        "100.64.0.1",
        "100.127.255.255",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "0xffffffff",
        "192.0.0.1",
        // Metadata of clouds.
        "169.254.169.254",
        "169.254.169.254.",
        "0xa9fea9fe",
        "2852039166",
        "0251.0376.0251.0376",
        "169.254.43518",
        "169.254.170.2",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "metadata.google.internal",
        "metadata.google.internal.",
        "metadata",
        "METADATA.GOOGLE.INTERNAL",
        "metadata.goog",
        "instance-data",
        "instance-data.ec2.internal",
        "metadata.azure.internal",
        // Names of local networks, and names that lead inside.
        "router.lan",
        "printer.local",
        "wiki.corp",
        "nas.home",
        "vault.internal",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "intranet",
        "db",
        "1.0.0.127.in-addr.arpa",
        "x.home.arpa",
        "abc.onion",
        "six.example.com",
        "mapped.example.com",
        "translated.example.com",
        "compatible.example.com",
        "mixed.example.com",
        "mixed6.example.com",
        "rebind.example.com",
        "rebind.example.com.",
        "none.example.com",
        "nowhere.example.com",
        "listed.example.com",
    ]
    .iter()
    .map(|host| (*host).to_owned())
    .collect();
    for addr in [
        "127-0-0-1",
        "127-1-2-3",
        "10-0-0-1",
        "10-99-1-2",
        "172-16-5-4",
        "172-31-0-1",
        "192-168-0-1",
        "192-168-122-1",
        "169-254-169-254",
        "100-64-1-1",
        "100-100-100-200",
        "168-63-129-16",
        "0-0-0-0",
        "224-0-0-251",
        "255-255-255-255",
        "198-18-7-7",
        "192-0-0-192",
        "240-1-1-1",
    ] {
        hosts.push(format!("{addr}.v4.example.com"));
        hosts.push(format!("{addr}.V4.Example.COM."));
    }
    hosts
}

/// URLs that want to reach the canary.
fn urls(port: u16) -> Vec<String> {
    let mut urls = Vec::new();
    for host in hosts() {
        urls.push(format!("http://{host}:{port}/secret"));
        urls.push(format!("https://{host}:{port}/"));
    }
    for trick in [
        "http://example.com@127.0.0.1:{}/",
        "http://127.0.0.1:{}@example.com:22/",
        "http://user:pass@localhost:{}/",
        "http:127.0.0.1:{}/",
        "http:/127.0.0.1:{}/",
        "http:///127.0.0.1:{}/",
        "http:\\\\127.0.0.1:{}\\",
        "http:/\\127.0.0.1:{}",
        "\thttp://127.0.\n0.1:{}/",
        "  http://127.0.0.1:{}/  ",
        "http://127.0.0.1\t:{}/",
        "HtTp://127.0.0.1:{}/",
        "http://127.0.0.1:0{}/",
        "http://127.0.0.1:{}#@example.com/",
        "http://127.0.0.1:{}?@example.com/",
        "http://127.0.0.1:{}\\@example.com/",
        "//127.0.0.1:{}/",
        "127.0.0.1:{}",
        "localhost:{}",
        "ftp://127.0.0.1:{}/",
        "gopher://127.0.0.1:{}/_GET%20/",
        "dict://127.0.0.1:{}/x",
        "ws://127.0.0.1:{}/",
        "file://127.0.0.1:{}/etc/passwd",
        "file:///etc/passwd",
        "jar:http://127.0.0.1:{}!/",
        "view-source:http://127.0.0.1:{}/",
        "unix:/run/docker.sock",
        "http://127.0.0.1:{}/\r\nHost: example.com",
        "http://[::1]:{}/%0d%0aX: y",
        "http://[::ffff:127.0.0.1%25lo]:{}/",
        "http://[127.0.0.1]:{}/",
        "http://127.0.0.1 :{}/",
        "http://127.0.0.1%20:{}/",
        "http://127.0.0.1%00.example.com:{}/",
        "http://127.0.0.1\u{0}:{}/",
        "http://.127.0.0.1:{}/",
        "http://0x7f.1.:{}/",
        "http://0x100000000:{}/",
        "http://127.0.0.1.0x0:{}/",
        "http://4294967297:{}/",
    ] {
        urls.push(trick.replace("{}", &port.to_string()));
    }
    urls
}

#[tokio::test]
async fn none_of_hundreds_of_hostile_urls_reaches_the_canary() {
    let canary = Canary::listen();
    let urls = urls(canary.port);
    assert!(urls.len() >= 300, "{}", urls.len());

    // The canary sings, and our own fetcher would make it sing, were it allowed to.
    drop(TcpStream::connect(("127.0.0.1", canary.port)).unwrap());
    canary.has_counted(1).await;
    let open = fetcher(&[format!("127.0.0.1:{}", canary.port)]);
    assert!(open.fetch(&format!("http://127.1:{}/", canary.port)).await.is_err());
    canary.has_counted(2).await;
    let before = canary.visits();

    let strict = fetcher(&[]);
    for url in &urls {
        let error = strict.fetch(url).await.unwrap_err();
        let expected = error.is_refusal() || matches!(error, FetchError::Resolve { .. });
        assert!(expected, "{url:?}: {error:?}");
        assert!(!error.hint().is_empty() && !error.to_string().ends_with('.'), "{error}");
    }

    // The same, as places that a page which may be read wants to send us.
    let port = canary.port;
    // No header carries a zero.
    let urls: Vec<String> = urls.into_iter().filter(|url| !url.contains('\0')).collect();
    let targets = urls.clone();
    let server =
        Loopback::serve(move |asked| match asked.path.strip_prefix("/go/").and_then(|nth| nth.parse::<usize>().ok()) {
            // A line end would end the header; the rest of the trick is in what stands before.
            Some(nth) => Said::moved(
                [301, 302, 303, 307, 308][nth % 5],
                targets[nth].split(['\r', '\n']).next().unwrap_or_default(),
            ),
            None if asked.path == "/robots.txt" => Said::new(404, "text/plain", ""),
            None => Said::html("<p>fine"),
        });
    let led = fetcher(&[server.addr.to_string(), "listed.example.com:80".to_owned()]);
    assert!(led.fetch(&server.url("/")).await.is_ok(), "what is listed is read");
    let mut refused = 0;
    for (nth, url) in urls.iter().enumerate() {
        // Without a scheme it is a place on the same server, which is fine to go to.
        match led.fetch(&server.url(&format!("/go/{nth}"))).await {
            Ok(page) => assert_eq!(page.url.split('/').nth(2), Some(server.addr.to_string().as_str()), "{url}"),
            Err(error) => {
                let expected = error.is_refusal() || matches!(error, FetchError::Resolve { .. });
                assert!(expected, "{url:?}: {error:?}");
                refused += 1;
            }
        }
    }
    assert!(refused >= 290, "{refused}");
    // A robots.txt that leads inside is no way in either.
    let sly = Loopback::serve(move |asked| match asked.path.as_str() {
        "/robots.txt" => Said::moved(302, &format!("http://127.0.0.1:{port}/robots.txt")),
        _ => Said::html("<p>fine"),
    });
    let error = fetcher_for(&sly).fetch(&sly.url("/")).await.unwrap_err();
    assert_eq!(error.code(), "robots_unknown");
    assert_eq!(canary.visits(), before, "somebody reached the canary");
}

fn page_of(asked: &Asked) -> Said {
    match asked.path.as_str() {
        "/robots.txt" => Said::new(200, "text/plain", "user-agent: *\ndisallow: /secret\nallow: /secret/open\n"),
        "/article" => Said::html("<title>A page</title><script>x</script><h1>Head</h1><p>Some words &amp; more."),
        "/moved" => Said::moved(302, "/moved/again"),
        "/moved/again" => Said::moved(308, "article?x#y"),
        "/moved/article?x" => Said::html("<p>arrived"),
        "/ring" => Said::moved(302, "/ring"),
        "/moved-nowhere" => Said::new(302, "text/html", "no place to go"),
        "/secret/open/x" => Said::new(200, "text/plain", "open\u{1b}[31m"),
        "/picture" => Said::new(200, "image/png", b"\x89PNG".to_vec()),
        "/gone" => Said::new(404, "text/html", "gone"),
        "/long" => Said::new(200, "text/plain", vec![b'a'; 3 << 20]),
        "/broken" => Said::new(200, "text/plain", "half").broken(),
        "/brotli" => Said::new(200, "text/plain", "x").with("content-encoding", "br"),
        "/json" => Said::json(200, "{\"a\": 1}"),
        other => Said::new(500, "text/plain", format!("unexpected {other}")),
    }
}

#[tokio::test]
async fn pages_are_read_as_a_worker_sees_them_or_refused_with_a_reason() {
    let server = Loopback::serve(page_of);
    let fetcher = fetcher_for(&server);
    let page = fetcher.fetch(&server.url("/article#part")).await.unwrap();
    assert_eq!((page.title.as_deref(), page.status, page.charset.as_str()), (Some("A page"), 200, "UTF-8"));
    assert!(page.text.contains("Some words & more.") && !page.text.contains('<'), "{}", page.text);
    assert_eq!((page.sha256, page.truncated), (sha256(&page.text), false));
    let moved = fetcher.fetch(&server.url("/moved")).await.unwrap();
    assert_eq!((moved.url.clone(), moved.redirects.len()), (server.url("/moved/article?x"), 2));
    assert!(moved.text.contains("arrived"));
    let open = fetcher.fetch(&server.url("/secret/open/x")).await.unwrap();
    assert_eq!(open.text, "open[31m", "nothing that steers a terminal");
    let long = fetcher.fetch(&server.url("/long")).await.unwrap();
    assert_eq!((long.text.len(), long.truncated), (2 << 20, true));
    assert_eq!(fetcher.fetch(&server.url("/json")).await.unwrap().text, "{\"a\": 1}");

    for (path, code) in [
        ("/ring", "too_many_redirects"),
        ("/moved-nowhere", "status"),
        ("/secret/x", "robots"),
        ("/picture", "content_type"),
        ("/gone", "status"),
        ("/broken", "transport"),
        ("/brotli", "encoding"),
    ] {
        assert_eq!(fetcher.fetch(&server.url(path)).await.unwrap_err().code(), code, "{path}");
    }
    let paths = server.paths();
    assert_eq!(paths.iter().filter(|path| *path == "/robots.txt").count(), 1, "asked once");
    assert_eq!(paths.iter().filter(|path| *path == "/ring").count(), 6, "five redirects are followed");
    assert!(!paths.contains(&"/secret/x".to_owned()));
    for asked in server.asked() {
        assert_eq!(asked.method, "GET");
        for header in ["cookie", "authorization", "referer", "x-api-key"] {
            assert_eq!(asked.header(header), None);
        }
        assert!(asked.header("user-agent").unwrap().starts_with("drover/"));
    }
}

#[tokio::test]
async fn a_site_whose_wish_is_unknown_is_left_alone() {
    for (answer, code) in [
        (Said::new(503, "text/plain", ""), Some("robots_unknown")),
        (Said::new(200, "text/plain", "user-agent: *\ndis").broken(), Some("robots_unknown")),
        (Said::moved(302, "/robots.txt"), Some("robots_unknown")),
        (Said::new(403, "text/plain", "user-agent: *\ndisallow: /"), None),
        (Said::new(200, "text/html", "<h1>not a robots.txt"), None),
    ] {
        let server = Loopback::serve(
            move |asked| if asked.path == "/robots.txt" { answer.clone() } else { Said::html("<p>hi") },
        );
        let error = fetcher_for(&server).fetch(&server.url("/")).await.err();
        assert_eq!(error.as_ref().map(FetchError::code), code, "{error:?}");
    }
}

#[tokio::test]
async fn a_host_is_asked_no_more_than_twice_at_once() {
    let gate = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let inside = Arc::clone(&gate);
    let server = Loopback::serve(move |asked| {
        if asked.path != "/robots.txt" {
            let now = inside.0.fetch_add(1, Ordering::SeqCst) + 1;
            inside.1.fetch_max(now, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
            inside.0.fetch_sub(1, Ordering::SeqCst);
        }
        Said::html("<p>hi")
    });
    let fetcher = fetcher_for(&server);
    let urls: Vec<String> = (0..16).map(|nth| server.url(&format!("/{nth}"))).collect();
    let pages = futures::future::join_all(urls.iter().map(|url| fetcher.fetch(url))).await;
    assert!(pages.iter().all(Result::is_ok), "{pages:?}");
    assert_eq!(gate.1.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_not_waited_for() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap();
    let settings =
        FetchSettings { allow: vec![addr.to_string()], head: Duration::from_millis(50), ..FetchSettings::default() };
    let fetcher = Fetcher::new(settings.clone()).unwrap();
    let error = fetcher.fetch(&format!("http://{addr}/")).await.unwrap_err();
    assert!(matches!(&error, FetchError::Timeout { what: "answer", .. }), "{error}");
    let short = FetchSettings { head: Duration::from_mins(1), total: Duration::from_millis(50), ..settings };
    let error = Fetcher::new(short).unwrap().fetch(&format!("http://{addr}/")).await.unwrap_err();
    assert_eq!(error.code(), "timeout", "{error}");
}
