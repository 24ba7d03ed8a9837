//! The north-bound interface as one table: method and path to what is asked for.
//!
//! The rule: an allow-list. What Triton offers beyond it (repository, shared memory, trace, log,
//! statistics, config, generate) is refused at the edge, known to us by name or not. A path has one
//! spelling: anything that could be normalised to another is refused.

use http::Method;

use crate::errors::Refusal;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route<'a> {
    Live,
    Ready,
    ServerMetadata,
    ModelMetadata { model: &'a str, version: &'a str },
    ModelReady { model: &'a str, version: &'a str },
    ModelInfer { model: &'a str, version: &'a str },
    Grpc(GrpcMethod),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrpcMethod {
    ServerLive,
    ServerReady,
    ServerMetadata,
    ModelReady,
    ModelMetadata,
    ModelInfer,
    ModelStreamInfer,
    HealthCheck,
    HealthWatch,
}

impl Route<'_> {
    /// The bounded name of a route in metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Ready => "ready",
            Self::ServerMetadata => "server-metadata",
            Self::ModelMetadata { .. } => "model-metadata",
            Self::ModelReady { .. } => "model-ready",
            Self::ModelInfer { .. } => "infer",
            Self::Grpc(method) => match method {
                GrpcMethod::ServerLive => "live",
                GrpcMethod::ServerReady => "ready",
                GrpcMethod::ServerMetadata => "server-metadata",
                GrpcMethod::ModelReady => "model-ready",
                GrpcMethod::ModelMetadata => "model-metadata",
                GrpcMethod::ModelInfer => "infer",
                GrpcMethod::ModelStreamInfer => "stream-infer",
                GrpcMethod::HealthCheck | GrpcMethod::HealthWatch => "health",
            },
        }
    }
}

/// Finds the route of a request. `path` has no query.
pub fn route<'a>(method: &Method, path: &'a str) -> Result<Route<'a>, Refusal> {
    if let Some(called) = path.strip_prefix("/inference.GRPCInferenceService/") {
        let found = grpc_method(called).ok_or(Refusal::NotOffered)?;
        return allow(method, &Method::POST, Route::Grpc(found));
    }
    match path {
        "/grpc.health.v1.Health/Check" => return allow(method, &Method::POST, Route::Grpc(GrpcMethod::HealthCheck)),
        "/grpc.health.v1.Health/Watch" => return allow(method, &Method::POST, Route::Grpc(GrpcMethod::HealthWatch)),
        _ => check_normal_form(path)?,
    }
    // One slash at the end is what `/v2/` means in the protocol's own examples.
    let Some(rest) = path.strip_prefix("/v2") else { return Err(Refusal::NotFound) };
    if rest.is_empty() || rest == "/" {
        return allow(method, &Method::GET, Route::ServerMetadata);
    }
    let Some(rest) = rest.strip_prefix('/') else { return Err(Refusal::NotFound) };
    let mut parts = [""; 6];
    let mut count = 0;
    for part in rest.split('/') {
        *parts.get_mut(count).ok_or(Refusal::NotOffered)? = part;
        count += 1;
    }
    let (found, expected) = match parts[..count] {
        ["health", "live"] => (Route::Live, Method::GET),
        ["health", "ready"] => (Route::Ready, Method::GET),
        // `/v2/models/stats` is Triton's, so no model can have this name in a path.
        ["models", "stats"] => return Err(Refusal::NotOffered),
        ["models", model] => (Route::ModelMetadata { model, version: "" }, Method::GET),
        ["models", model, "ready"] => (Route::ModelReady { model, version: "" }, Method::GET),
        ["models", model, "infer"] => (Route::ModelInfer { model, version: "" }, Method::POST),
        ["models", model, "versions", version] => (Route::ModelMetadata { model, version }, Method::GET),
        ["models", model, "versions", version, "ready"] => (Route::ModelReady { model, version }, Method::GET),
        ["models", model, "versions", version, "infer"] => (Route::ModelInfer { model, version }, Method::POST),
        _ => return Err(Refusal::NotOffered),
    };
    allow(method, &expected, found)
}

fn allow<'a>(method: &Method, expected: &Method, route: Route<'a>) -> Result<Route<'a>, Refusal> {
    if method == expected {
        return Ok(route);
    }
    Err(Refusal::Method { allow: if *expected == Method::GET { "GET" } else { "POST" } })
}

fn grpc_method(name: &str) -> Option<GrpcMethod> {
    Some(match name {
        "ModelInfer" => GrpcMethod::ModelInfer,
        "ModelStreamInfer" => GrpcMethod::ModelStreamInfer,
        "ServerLive" => GrpcMethod::ServerLive,
        "ServerReady" => GrpcMethod::ServerReady,
        "ServerMetadata" => GrpcMethod::ServerMetadata,
        "ModelReady" => GrpcMethod::ModelReady,
        "ModelMetadata" => GrpcMethod::ModelMetadata,
        _ => return None,
    })
}

/// No name of ours needs an escape, so an escape can only be a second spelling of something.
fn check_normal_form(path: &str) -> Result<(), Refusal> {
    let bytes = path.as_bytes();
    let plain = |byte: &u8| (0x21..0x7f).contains(byte) && !matches!(byte, b'%' | b';' | b'\\' | b'#' | b'?');
    if bytes.first() != Some(&b'/') || !bytes.iter().all(plain) {
        return Err(Refusal::Path);
    }
    let body = path[1..].strip_suffix('/').unwrap_or(&path[1..]);
    let dotted = |segment: &str| matches!(segment, "" | "." | "..");
    if !body.is_empty() && body.split('/').any(dotted) {
        return Err(Refusal::Path);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(path: &str) -> Result<Route<'_>, String> {
        route(&Method::GET, path).map_err(|refusal| refusal.answer().code.into_owned())
    }

    fn post(path: &str) -> Result<Route<'_>, String> {
        route(&Method::POST, path).map_err(|refusal| refusal.answer().code.into_owned())
    }

    #[test]
    fn the_protocols_paths_are_found() {
        assert_eq!(get("/v2"), Ok(Route::ServerMetadata));
        assert_eq!(get("/v2/"), Ok(Route::ServerMetadata));
        assert_eq!(get("/v2/health/live"), Ok(Route::Live));
        assert_eq!(get("/v2/models/m"), Ok(Route::ModelMetadata { model: "m", version: "" }));
        assert_eq!(get("/v2/models/m/versions/1/ready"), Ok(Route::ModelReady { model: "m", version: "1" }));
        assert_eq!(post("/v2/models/m/infer"), Ok(Route::ModelInfer { model: "m", version: "" }));
        assert_eq!(post("/v2/models/m/versions/2/infer"), Ok(Route::ModelInfer { model: "m", version: "2" }));
        assert_eq!(post("/inference.GRPCInferenceService/ModelInfer"), Ok(Route::Grpc(GrpcMethod::ModelInfer)));
    }

    #[test]
    fn t22_a_path_has_one_spelling() {
        for path in [
            "/v2/models/m%2finfer",
            "/v2/%2e%2e/health/live",
            "/v2//health/live",
            "//v2/health/live",
            "/v2/./health/live",
            "/v2/models/../health/live",
            "/v2/models/m;x=1/infer",
            "/v2/models\\m",
            "/v2/models/m/infer//",
            "v2",
            "",
        ] {
            assert_eq!(get(path), Err("invalid-path".into()), "{path:?}");
        }
    }

    #[test]
    fn t39_the_rest_of_triton_is_refused() {
        for path in [
            "/v2/repository/index",
            "/v2/repository/models/m/load",
            "/v2/repository/models/m/unload",
            "/v2/systemsharedmemory/status",
            "/v2/systemsharedmemory/region/a/register",
            "/v2/cudasharedmemory/status",
            "/v2/tpusharedmemory/region/a/register",
            "/v2/trace/setting",
            "/v2/logging",
            "/v2/models/stats",
            "/v2/models/m/stats",
            "/v2/models/m/config",
            "/v2/models/m/generate",
            "/v2/models/m/generate_stream",
            "/v2/models/m/trace/setting",
            "/v2/models/m/versions/1/stats",
            "/v2/a/b/c/d/e/f/g/h",
            "/inference.GRPCInferenceService/RepositoryModelLoad",
            "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
            "/inference.GRPCInferenceService/ModelStatistics",
            "/inference.GRPCInferenceService/anything",
        ] {
            assert_eq!(post(path), Err("not-offered".into()), "{path}");
        }
    }

    #[test]
    fn unknown_paths_and_wrong_methods_are_told_apart() {
        for path in ["/", "/metrics", "/v1/models", "/v22", "/favicon.ico"] {
            assert_eq!(get(path), Err("not-found".into()), "{path}");
        }
        assert_eq!(post("/v2/health/live"), Err("method-not-allowed".into()));
        assert_eq!(get("/v2/models/m/infer"), Err("method-not-allowed".into()));
        assert_eq!(get("/inference.GRPCInferenceService/ModelInfer"), Err("method-not-allowed".into()));
    }
}
