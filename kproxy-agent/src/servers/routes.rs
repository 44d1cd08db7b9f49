//! What is answered under which path. Thin: every answer is a function of [`State`].

use axum::{
    Router,
    body::Body,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};

use super::{
    State,
    exposition::CONTENT_TYPE,
    health::{HealthReport, Moment},
};
use crate::model::objects::Family;

/// What `/proxyMode` says.
pub const PROXY_MODE: &str = "kproxy";

const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// `--healthz-bind-address`. As there, methods do not matter.
pub(super) fn healthz(state: &State) -> Router {
    let (healthz, livez, readyz) = (state.clone(), state.clone(), state.clone());
    Router::new()
        .route("/healthz", any(async move || health(healthz.healthz(Moment::now()))))
        .route("/livez", any(async move || health(livez.livez(Moment::now()))))
        .route("/readyz", any(async move || health(readyz.readyz(Moment::now()))))
        .fallback(not_found)
}

/// `--metrics-bind-address`.
pub(super) fn metrics(state: &State) -> Router {
    let (scraped, configured) = (state.clone(), state.clone());
    Router::new()
        .route("/metrics", any(async move || scrape(scraped).await))
        .route("/healthz", any(async || answer(StatusCode::OK, TEXT, "ok")))
        .route("/proxyMode", any(async || answer(StatusCode::OK, TEXT, PROXY_MODE)))
        .route("/configz", any(async move || answer(StatusCode::OK, JSON, configured.configz())))
        .fallback(not_found)
}

/// A Service's `healthCheckNodePort` on an address of `family`: any path, any method.
pub(super) fn health_check(state: &State, port: u16, family: Family) -> Router {
    let state = state.clone();
    Router::new().fallback(async move || check(&state, port, family))
}

fn health(report: HealthReport) -> Response {
    let status = if report.is_ok() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    match serde_json::to_string(&report) {
        Ok(body) => answer(status, JSON, body),
        Err(error) => internal_error(&error),
    }
}

fn check(state: &State, port: u16, family: Family) -> Response {
    let Some(check) = state.health_check(port, family, Moment::now()) else {
        // A connection that was open when the Service went: there is nothing here to send traffic to.
        return answer(
            StatusCode::SERVICE_UNAVAILABLE,
            TEXT,
            "no Service has this healthCheckNodePort any more\n",
        );
    };
    let status = if check.is_ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let mut response = answer(status, JSON, check.body);
    response.headers_mut().insert(WEIGHT, HeaderValue::from(check.weight));
    response
}

/// Reading the kernel's counters and writing some ten thousand lines takes milliseconds: not on a thread that
/// others wait for.
async fn scrape(state: State) -> Response {
    match tokio::task::spawn_blocking(move || state.metrics().exposition()).await {
        Ok(Ok(body)) => answer(StatusCode::OK, CONTENT_TYPE, body),
        Ok(Err(error)) => internal_error(&error),
        Err(error) => internal_error(&error),
    }
}

async fn not_found() -> Response {
    answer(StatusCode::NOT_FOUND, TEXT, "404 page not found\n")
}

fn internal_error(error: &dyn std::error::Error) -> Response {
    tracing::error!("a request could not be answered: {error}");
    answer(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n"))
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    (status, headers, body.into()).into_response()
}
