//! Who may talk to the server: no request that a web page elsewhere causes, and from other machines only clients that
//! know the token.
//!
//! A page elsewhere can make a browser send requests here. Then the Origin is not the Host, or the browser says itself
//! that the request crosses sites. If the page's name was made to resolve to this address (DNS rebinding), the Host is
//! that name, which is none of ours. Requests that change something must be JSON, which no page may send to another
//! site unasked.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN,
};
use axum::http::uri::Authority;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::json;

use super::refusal::Refusal;

/// Length of the shortest token that nobody can guess over a network.
pub const TOKEN: usize = 16;
/// The cookie by which the page proves that it knows the token.
const SESSION: &str = "edm2k";

/// The rules.
#[derive(Debug)]
pub struct Guard {
    /// Names that this server is reached by, beside addresses and localhost.
    hosts: Vec<String>,
    /// Hash of the token, and the value that the cookie holds in its place.
    token: Option<(blake3::Hash, String)>,
}

/// Why a server must not be opened in this way.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Unsafe {
    #[error("{0} is reached from other machines, which needs a --token of {TOKEN} characters at least")]
    NoToken(SocketAddr),
    #[error("the token has {0} characters, expected {TOKEN} at least")]
    Short(usize),
}

impl Guard {
    /// The rules of a server at an address.
    ///
    /// # Errors
    /// [`Unsafe`].
    pub fn new(listen: SocketAddr, hosts: Vec<String>, token: Option<&str>) -> Result<Self, Unsafe> {
        match token {
            None if !listen.ip().is_loopback() => return Err(Unsafe::NoToken(listen)),
            Some(token) if token.chars().count() < TOKEN => return Err(Unsafe::Short(token.chars().count())),
            _ => {}
        }
        let token = token.map(|token| {
            let session = blake3::derive_key("edm2k serve: session cookie", token.as_bytes());
            (blake3::hash(token.as_bytes()), blake3::Hash::from(session).to_hex().to_string())
        });
        Ok(Self { hosts, token })
    }

    /// Whether this is the token; hashes are compared in constant time.
    pub fn knows(&self, token: &str) -> bool {
        self.token.as_ref().is_none_or(|(hash, _)| *hash == blake3::hash(token.as_bytes()))
    }

    /// The cookie that a browser keeps after it has given the token. No script can read it, and no other site can have
    /// it sent.
    pub fn cookie(&self) -> Option<HeaderValue> {
        let (_, session) = self.token.as_ref()?;
        HeaderValue::from_str(&format!("{SESSION}={session}; Path=/; HttpOnly; SameSite=Strict")).ok()
    }

    /// Whether a request comes from this server's own page, or from no page.
    fn check_site(&self, headers: &HeaderMap, api: bool) -> Result<(), Refusal> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("not readable"));
        let host = text(HOST).unwrap_or_default();
        let ours = host.parse::<Authority>().is_ok_and(|host| {
            let name = host.host();
            let address = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
            let port = host.as_str() == name || host.port_u16().is_some();
            // An attacker's page has a name, which may be made to resolve to any address. An address cannot be made
            // another one.
            port && !host.as_str().contains('@')
                && (address
                    || name.eq_ignore_ascii_case("localhost")
                    || self.hosts.iter().any(|known| known.eq_ignore_ascii_case(name)))
        });
        if !ours {
            return Err(Refusal::Forbidden(format!("Host {host:?} is not this server; --host NAME would make it so")));
        }
        if let Some(origin) = text(ORIGIN) {
            let same = origin
                .split_once("://")
                .is_some_and(|(scheme, site)| matches!(scheme, "http" | "https") && site.eq_ignore_ascii_case(host));
            if !same {
                return Err(Refusal::Forbidden(format!(
                    "Origin {origin:?}: pages of other sites may not use this server"
                )));
            }
        }
        match text(HeaderName::from_static("sec-fetch-site")) {
            Some("cross-site" | "same-site") if api => {
                Err(Refusal::Forbidden("pages of other sites may not use this server".into()))
            }
            _ => Ok(()),
        }
    }

    /// Whether a request proves that its sender knows the token: as a bearer's, as the password of any user, or by the
    /// cookie.
    fn check_token(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some((_, session)) = &self.token else { return Ok(()) };
        let text = |name| headers.get_all(name).into_iter().filter_map(|value: &HeaderValue| value.to_str().ok());
        let cookies = || text(COOKIE).flat_map(|all| all.split(';')).filter_map(|one| one.trim().split_once('='));
        let session = blake3::hash(session.as_bytes());
        let known = text(AUTHORIZATION).any(|value| match value.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => self.knows(token.trim()),
            Some((scheme, both)) if scheme.eq_ignore_ascii_case("basic") => {
                let both = BASE64_STANDARD.decode(both.trim()).ok().and_then(|both| String::from_utf8(both).ok());
                both.is_some_and(|both| both.split_once(':').is_some_and(|(_, password)| self.knows(password)))
            }
            _ => false,
        });
        let cookie = || cookies().any(|(name, value)| name == SESSION && blake3::hash(value.as_bytes()) == session);
        if known || cookie() { Ok(()) } else { Err(Refusal::Token) }
    }
}

/// Paths that need no token: the page, which asks for it, and the one to which it is sent.
fn is_open(path: &str) -> bool {
    !path.starts_with("/api/") && !path.starts_with("/sdapi/") || path == "/api/v1/session"
}

/// Headers of every answer. With them a browser loads nothing from elsewhere, runs nothing that is not in a file of
/// ours, and shows the page in no frame.
const HEADERS: [(&str, &str); 7] = [
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-store"),
];

/// Lets through requests that may reach the server.
pub async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let api = path.starts_with("/api/") || path.starts_with("/sdapi/");
    let allowed = guard.check_site(request.headers(), api).and_then(|()| match is_open(path) {
        true => Ok(()),
        false => guard.check_token(request.headers()),
    });
    let mut response = match allowed {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    if api {
        response = with_detail(response).await;
    }
    for (name, value) in HEADERS {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    response
}

/// Gives what the framework refuses, a path or a method, the form of every other refusal.
async fn with_detail(response: Response) -> Response {
    let json = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes() == b"application/json");
    if !response.status().is_client_error() || json {
        return response;
    }
    let (mut head, body) = response.into_parts();
    let said = axum::body::to_bytes(body, 1 << 12).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&said);
    let detail = if text.is_empty() { head.status.canonical_reason().unwrap_or_default() } else { text.as_ref() };
    for name in [CONTENT_TYPE, CONTENT_LENGTH] {
        head.headers.remove(name);
    }
    (head, Json(json!({"detail": detail}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn other_sites_are_refused_by_host_and_origin() {
        let guard = Guard::new(([127, 0, 0, 1], 7860).into(), vec!["box.lan".into()], None).unwrap();
        let ours = |all: &[(&'static str, &str)]| guard.check_site(&headers(all), true).is_ok();
        for host in ["127.0.0.1:7860", "localhost:9999", "LOCALHOST", "[::1]:7860", "192.168.1.9", "box.lan:7860"] {
            assert!(ours(&[("host", host)]), "{host}");
            assert!(ours(&[("host", host), ("origin", &format!("http://{host}"))]), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example:7860", "localhost.evil", "", "a@127.0.0.1", "127.0.0.1:x"]
        {
            assert!(!ours(&[("host", host)]), "{host}");
        }
        assert!(!ours(&[]));
        for origin in
            ["null", "http://evil.example", "http://localhost:3000", "file://localhost:7860", "localhost:7860"]
        {
            assert!(!ours(&[("host", "localhost:7860"), ("origin", origin)]), "{origin}");
        }
        for site in ["cross-site", "same-site"] {
            assert!(!ours(&[("host", "localhost:7860"), ("sec-fetch-site", site)]));
        }
        assert!(ours(&[("host", "localhost:7860"), ("sec-fetch-site", "same-origin")]));
    }

    #[test]
    fn other_machines_need_the_token() {
        let everywhere = ([0, 0, 0, 0], 7860).into();
        assert!(matches!(Guard::new(everywhere, vec![], None), Err(Unsafe::NoToken(_))));
        assert!(matches!(Guard::new(everywhere, vec![], Some("short")), Err(Unsafe::Short(5))));
        let token = "correct horse battery";
        let guard = Guard::new(everywhere, vec![], Some(token)).unwrap();
        let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("me:{token}")));
        let cookie = guard.cookie().unwrap();
        let cookie = cookie.to_str().unwrap().split(';').next().unwrap();
        assert!(!cookie.contains("horse"));
        for (name, value) in
            [("authorization", format!("Bearer {token}").as_str()), ("authorization", &basic), ("cookie", cookie)]
        {
            assert!(guard.check_token(&headers(&[(name, value)])).is_ok(), "{value}");
        }
        for (name, value) in [
            ("authorization", "Bearer correct horse batterz"),
            ("authorization", "Bearer "),
            ("authorization", "Basic ????"),
            ("authorization", token),
            ("cookie", "edm2k=0"),
            ("x-token", token),
        ] {
            assert!(guard.check_token(&headers(&[(name, value)])).is_err(), "{value}");
        }
    }
}
