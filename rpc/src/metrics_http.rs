//! Metrics over HTTP: `GET /metrics`.
//!
//! The HTTP server's tasks must be sendable between threads and the target is not, so a request goes over a channel to a
//! task that takes the picture.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::metrics::{Scrape, exposition};
use crate::target::Target;

/// Scrapes that may wait for a picture.
const SCRAPES_WAITING: usize = 8;

type Scrapes = mpsc::Sender<oneshot::Sender<Scrape>>;

/// Serves metrics for as long as the runtime lives; says on which address. Must be called on a `LocalSet`.
///
/// # Errors
/// The address cannot be listened on.
pub(crate) async fn serve(address: SocketAddr, target: Rc<Target>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let (scrapes, mut asked) = mpsc::channel::<oneshot::Sender<Scrape>>(SCRAPES_WAITING);
    tokio::task::spawn_local(async move {
        while let Some(reply) = asked.recv().await {
            // A client that has gone needs no picture.
            let _ = reply.send(target.scrape().await);
        }
    });
    let router = Router::new().route("/metrics", get(metrics)).with_state(scrapes);
    tokio::task::spawn_local(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics are no longer served");
        }
    });
    Ok(address)
}

async fn metrics(State(scrapes): State<Scrapes>) -> Response {
    let (reply, picture) = oneshot::channel();
    let asked = scrapes.send(reply).await.is_ok();
    let text = match picture.await {
        Ok(scrape) if asked => exposition(scrape).map_err(|error| error.to_string()),
        Ok(_) | Err(_) => Err("the target is stopping".to_owned()),
    };
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

impl Target {
    /// A picture of this moment.
    async fn scrape(&self) -> Scrape {
        let ids: Vec<String> = self.graph().jobs.keys().cloned().collect();
        for id in ids {
            // One that ended in between keeps its last numbers.
            let _ = self.refresh_job(&id).await;
        }
        let graph = self.graph();
        Scrape {
            jobs: graph.jobs.values().map(|job| (job.id.clone(), job.info)).collect(),
            bdevs: graph
                .bdevs
                .iter()
                .map(|(name, entry)| (name.clone(), Arc::clone(entry.bdev.stats())))
                .collect(),
            links: graph
                .bdevs
                .iter()
                .filter_map(|(name, entry)| Some((name.clone(), entry.bdev.link()?)))
                .collect(),
            controllers: graph
                .controllers
                .values()
                .map(|it| (it.name.clone(), Arc::clone(it.stats())))
                .collect(),
            reactors: self
                .reactors
                .handles()
                .map(|reactor| (reactor.core(), Arc::clone(reactor.stats())))
                .collect(),
        }
    }
}
