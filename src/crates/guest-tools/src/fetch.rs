//! URLs, fetched from here: what answers may be hostile, and harms nobody but this guest.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::prelude::{Engine, BASE64_STANDARD};
use microvm_protocol::json::prefers_base64;
use microvm_protocol::message::{Code, Failure, Reason};
use serde::Deserialize;
use serde_json::{json, Value};
use ureq::http::{Method, Request, Uri};
use ureq::tls::{parse_pem, PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, AsSendBody, ResponseExt};
use url::Url;

use crate::resolve::{resolve, Unresolved};
use crate::{fail, read_params, Outcome};

const DEFAULT_BYTES: u64 = 1 << 20;
const MAX_BYTES: u64 = 8 << 20;
const DEFAULT_TIMEOUT_S: f64 = 30.0;
const MAX_TIMEOUT_S: f64 = 3600.0;
const MAX_REDIRECTS: u32 = 10;
/// Whom the image trusts, where the usual distributions keep it; without, whom Mozilla trusts.
const AUTHORITIES: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    url: String,
    method: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    body: Option<String>,
    body_base64: Option<String>,
    timeout: Option<f64>,
    max_bytes: Option<u64>,
}

/// What came back.
pub struct Fetched {
    /// Where the redirects led to.
    pub url: String,
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub truncated: bool,
}

pub fn process_request(params: Value, has_network: bool) -> Outcome {
    let params: Params = read_params(params)?;
    let bad = |message: String| Failure { code: Code::BadParams, message };
    let url = parse_url(&params.url)?;
    let method = params.method.as_deref().unwrap_or("GET").to_ascii_uppercase();
    let method = Method::from_bytes(method.as_bytes()).map_err(|e| bad(format!("method: {method:?}: {e}")))?;
    let seconds = params.timeout.unwrap_or(DEFAULT_TIMEOUT_S);
    if !(seconds > 0.0 && seconds <= MAX_TIMEOUT_S) {
        return Err(bad(format!("timeout: {seconds} is not above 0 and at most {MAX_TIMEOUT_S} seconds")));
    }
    let max = params.max_bytes.unwrap_or(DEFAULT_BYTES);
    if max > MAX_BYTES {
        return Err(bad(format!("max_bytes: {max} is over {MAX_BYTES}")));
    }
    let body = match (params.body, params.body_base64) {
        (Some(_), Some(_)) => return Err(bad("body: give either body or body_base64".into())),
        (Some(text), None) => Some(text.into_bytes()),
        (None, Some(text)) => Some(BASE64_STANDARD.decode(text).map_err(|e| bad(format!("body_base64: {e}")))?),
        (None, None) => None,
    };
    let takes_body = [Method::POST, Method::PUT, Method::PATCH].contains(&method);
    if body.is_some() && !takes_body {
        return Err(bad(format!("body: a {method} request has none")));
    }
    let mut request = Request::builder().method(method).uri(url.as_str());
    for (name, value) in &params.headers {
        request = request.header(name, value);
    }
    let limits = Limits { timeout: Duration::from_secs_f64(seconds), max_bytes: max };
    let malformed = |e: ureq::http::Error| bad(format!("headers: {e}"));
    let fetched = match takes_body {
        true => fetch(request.body(body.unwrap_or_default()).map_err(malformed)?, &url, limits, has_network),
        false => fetch(request.body(()).map_err(malformed)?, &url, limits, has_network),
    }?;
    let mut result = json!({
        "url": fetched.url,
        "status": fetched.status,
        "headers": fetched.headers,
        "truncated": fetched.truncated,
    });
    match String::from_utf8(fetched.body) {
        Ok(text) if !prefers_base64(&text) => result["body"] = Value::String(text),
        Ok(text) => result["body_base64"] = Value::String(BASE64_STANDARD.encode(text)),
        Err(error) => result["body_base64"] = Value::String(BASE64_STANDARD.encode(error.as_bytes())),
    }
    Ok(result)
}

/// A page for `render_page`.
pub fn fetch_page(url: &Url, max_bytes: u64, has_network: bool) -> Result<Fetched, Failure> {
    let request = Request::builder().uri(url.as_str()).body(());
    let request = request.map_err(|e| Failure { code: Code::BadParams, message: format!("url: {e}") })?;
    let limits = Limits { timeout: Duration::from_secs_f64(DEFAULT_TIMEOUT_S), max_bytes };
    fetch(request, url, limits, has_network)
}

/// An absolute URL that can be fetched; its name in the form that DNS knows.
pub fn parse_url(text: &str) -> Result<Url, Failure> {
    let bad = |why: String| Failure { code: Code::BadParams, message: format!("url: {text:?} {why}") };
    let url = Url::parse(text).map_err(|error| bad(format!("is not a URL: {error}")))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        scheme => Err(bad(format!("has the scheme {scheme:?}; http and https can be fetched"))),
    }
}

#[derive(Clone, Copy)]
struct Limits {
    timeout: Duration,
    max_bytes: u64,
}

fn fetch<B: AsSendBody>(request: Request<B>, url: &Url, limits: Limits, network: bool) -> Result<Fetched, Failure> {
    if !network {
        let way_out = "this VM has no network; create it with isolated_network=False";
        return fail(Code::NetworkIsolated, format!("{url} cannot be fetched: {way_out}"));
    }
    let tls = TlsConfig::builder().root_certs(authorities()).build();
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(MAX_REDIRECTS)
        .timeout_global(Some(limits.timeout))
        .tls_config(tls)
        .proxy(None)
        .user_agent(concat!("microvm-agent/", env!("CARGO_PKG_VERSION")))
        .build();
    let names = Names::default();
    let agent = Agent::with_parts(config, DefaultConnector::default(), names.clone());
    let mut response = agent.run(request).map_err(|error| failure(url, &error, &names))?;
    let final_url = response.get_uri().to_string();
    let status = response.status().as_u16();
    let header = |(name, value): (&ureq::http::HeaderName, &ureq::http::HeaderValue)| {
        (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let headers = response.headers().iter().map(header).collect();
    let mut body = Vec::new();
    // One byte more than asked for tells whether there is more.
    let read = response.body_mut().as_reader().take(limits.max_bytes + 1).read_to_end(&mut body);
    read.map_err(|error| failure(url, &ureq::Error::from(error), &names))?;
    let truncated = body.len() as u64 > limits.max_bytes;
    body.truncate(usize::try_from(limits.max_bytes).unwrap_or(usize::MAX));
    Ok(Fetched { url: final_url, status, headers, body, truncated })
}

fn authorities() -> RootCerts {
    let Some(pem) = AUTHORITIES.iter().find_map(|path| fs::read(path).ok()) else { return RootCerts::WebPki };
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    RootCerts::from(parse_pem(&pem).filter_map(certificate))
}

/// What was fetched, what went wrong, and which kind of thing that is.
fn failure(url: &Url, error: &ureq::Error, names: &Names) -> Failure {
    let kind = |reason| Code::NetworkError(reason);
    let said = names.said();
    let (code, message) = match error {
        ureq::Error::HostNotFound => (kind(Reason::Dns), said.unwrap_or_else(|| error.to_string())),
        ureq::Error::Timeout(_) => (kind(Reason::Timeout), error.to_string()),
        ureq::Error::Io(io) => match io.kind() {
            ErrorKind::ConnectionRefused => (kind(Reason::Refused), "connection refused".into()),
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::PermissionDenied => {
                (kind(Reason::Unreachable), format!("{io}: the network lets no packet pass to there"))
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => (kind(Reason::Timeout), io.to_string()),
            // rustls hands its findings on in this form.
            ErrorKind::InvalidData if url.scheme() == "https" => (kind(Reason::Tls), tls_words(io)),
            _ => (kind(Reason::Protocol), io.to_string()),
        },
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::Pem(_) => (kind(Reason::Tls), error.to_string()),
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => (Code::BadParams, error.to_string()),
        other => (kind(Reason::Protocol), other.to_string()),
    };
    Failure { code, message: format!("{url}: {message}") }
}

fn tls_words(error: &std::io::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

/// Our resolver in the form that the HTTP client takes, with what it last had to say.
#[derive(Debug, Clone, Default)]
struct Names(Arc<Mutex<Option<String>>>);

impl Names {
    fn said(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Resolver for Names {
    fn resolve(
        &self,
        uri: &Uri,
        _config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let authority = uri.authority().ok_or_else(|| ureq::Error::BadUri(uri.to_string()))?;
        let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        let port = authority.port_u16().unwrap_or(default);
        let left = if timeout.after.is_not_happening() { Duration::from_secs(60) } else { *timeout.after };
        let mut addresses = self.empty();
        match resolve(authority.host(), Instant::now() + left) {
            Ok(found) => {
                // The client's list holds no more than 16.
                found.iter().take(16).for_each(|address| addresses.push(SocketAddr::new((*address).into(), port)));
                Ok(addresses)
            }
            Err(Unresolved::TimedOut) => {
                self.note("no name server answered");
                Err(ureq::Error::HostNotFound)
            }
            Err(Unresolved::Failed(why)) => {
                self.note(&why);
                Err(ureq::Error::HostNotFound)
            }
        }
    }
}

impl Names {
    fn note(&self, why: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    /// A server for one connection: answers with `response`, and gives back what it was sent.
    fn serving(response: &'static [u8]) -> (String, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // A body may come in a packet of its own.
            stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap_err();
            stream.write_all(response).unwrap();
            String::from_utf8_lossy(&request).into_owned()
        });
        (url, thread)
    }

    fn reason(outcome: Outcome) -> Code {
        outcome.unwrap_err().code
    }

    #[test]
    fn test_process_request_gives_status_headers_and_body() {
        let (url, thread) = serving(b"HTTP/1.1 404 Not Found\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 2\r\n\r\nno");
        let result = process_request(json!({"url": url, "headers": {"X-Ask": "me"}}), true).unwrap();
        assert_eq!(
            (&result["status"], &result["body"], &result["truncated"]),
            (&json!(404), &json!("no"), &json!(false))
        );
        assert_eq!(result["headers"][0], json!(["x-a", "1"]));
        assert_eq!(result["url"], json!(url));
        assert!(thread.join().unwrap().to_lowercase().contains("x-ask: me"));
    }

    #[test]
    fn test_process_request_body_over_the_limit_is_cut_and_binary_is_base64() {
        let (url, thread) = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe\xfd\xfc");
        let result = process_request(json!({"url": url, "max_bytes": 2}), true).unwrap();
        assert_eq!((&result["body_base64"], &result["truncated"]), (&json!("//4="), &json!(true)));
        thread.join().unwrap();
    }

    #[test]
    fn test_process_request_post_sends_its_body() {
        let (url, thread) = serving(b"HTTP/1.1 204 No Content\r\n\r\n");
        process_request(json!({"url": url, "method": "post", "body": "a=1"}), true).unwrap();
        let request = thread.join().unwrap();
        assert!(request.starts_with("POST / HTTP/1.1\r\n") && request.ends_with("\r\n\r\na=1"), "{request}");
    }

    #[test]
    fn test_process_request_failures_have_their_reasons() {
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let ask = |url: String| reason(process_request(json!({"url": url, "timeout": 0.5}), true));
        assert_eq!(ask(format!("http://{closed}/")), Code::NetworkError(Reason::Refused));
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = silent.local_addr().unwrap();
        assert_eq!(ask(format!("http://{address}/")), Code::NetworkError(Reason::Timeout));
        let (url, thread) = serving(b"220 this is no TLS\r\n");
        assert_eq!(ask(url.replace("http:", "https:")), Code::NetworkError(Reason::Tls));
        thread.join().unwrap();
        let (url, thread) = serving(b"not HTTP at all\r\n\r\n");
        assert_eq!(ask(url), Code::NetworkError(Reason::Protocol));
        thread.join().unwrap();
    }

    #[test]
    fn test_process_request_bad_parameters_are_named() {
        for (params, word) in [
            (json!({"url": "ftp://a/"}), "scheme"),
            (json!({"url": "http://a/", "method": "A B"}), "method"),
            (json!({"url": "http://a/", "body": "x"}), "body"),
            (json!({"url": "http://a/", "headers": {"a b": "c"}}), "headers"),
            (json!({"url": "http://a/", "headers": {"a": "b\r\nc: d"}}), "headers"),
            (json!({"url": "http://a/", "timeout": 0}), "timeout"),
            (json!({"url": "http://a/", "max_bytes": 1u64 << 40}), "max_bytes"),
        ] {
            let error = process_request(params, true).unwrap_err();
            assert!(
                error.code == Code::BadParams && error.message.starts_with(word) || error.message.contains(word),
                "{error:?}"
            );
        }
    }

    #[test]
    fn test_process_request_without_a_network_is_isolated() {
        assert_eq!(reason(process_request(json!({"url": "http://a/"}), false)), Code::NetworkIsolated);
    }
}
