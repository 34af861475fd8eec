"""A server that answers what wandb-core 0.31 asks when it uploads a run, and keeps what it was sent."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "lab"


@dataclass
class Received:
    """A run as the server has it: fields of UpsertBucket (the last that was not null), lines of files by number."""

    fields: dict = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None
    upserts: int = 0

    @property
    def history(self) -> dict[int, dict]:
        """Rows by W&B's step, without W&B's own columns; a step of two lines would be an error of the client."""
        rows = [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]
        found = {row["_step"]: {k: v for k, v in row.items() if k[0] != "_"} for row in rows}
        assert len(found) == len(rows), "a step came twice"
        return found

    @property
    def summary(self) -> dict:
        sent = self.lines.get("wandb-summary.json", {})
        return {k: v for k, v in json.loads(sent[max(sent)]).items() if k[0] != "_"} if sent else {}

    @property
    def config(self) -> dict:
        return {k: v["value"] for k, v in json.loads(self.fields["config"]).items() if k != "_wandb"}


class WandbServer:
    """`with WandbServer() as server`: `server.url`, `server.runs`, and `server.trouble`, a function of a request.

    Attributes:
        trouble: takes the path and the run's id (None if the request names none) and returns a status to answer with,
            0 to drop the connection, or None for no trouble.
        requests: operations and paths in the order of their arrival.
        keys: the Authorization headers seen.
    """

    def __init__(self):
        self.runs: dict[str, Received] = {}
        self.requests: list[str] = []
        self.keys: set[str | None] = set()
        self.trouble = lambda path, run: None

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:
                    pass  # the client was stopped

            def do_POST(self):
                server.answer(self)

            do_GET = do_PUT = do_POST

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Read a request and answer it."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path, sent = request.path, {}
        if path == "/graphql" or path.endswith("/file_stream"):
            sent = json.loads(body)
        variables, parts = sent.get("variables") or {}, path.split("/")
        run = parts[-2] if parts[-1] == "file_stream" else variables.get("name") or variables.get("run")
        self.requests.append(sent.get("operationName") or path)
        self.keys.add(request.headers.get("Authorization"))
        status = self.trouble(path, run)
        if status == 0:
            request.close_connection = True
            return
        reply = {"error": "trouble"}
        if status is None:
            status, reply = 200, {}
            if "operationName" in sent:
                reply = {"data": getattr(self, sent["operationName"], lambda **_: {})(**variables)}
            elif parts[-1] == "file_stream":
                self.stream(self.runs[run], sent)
        text = json.dumps(reply).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def stream(self, run: Received, sent: dict) -> None:
        for name, part in sent.get("files", {}).items():
            for i, line in enumerate(part["content"], part["offset"]):
                run.lines.setdefault(name, {})[i] = line
        if sent.get("complete"):
            run.exit_code = sent["exitcode"]

    # ---- operations of GraphQL ---------------------------------------------------------------------------------------

    def Viewer(self):
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": "me",
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }

    def RunResumeStatus(self, name, project, **_):
        run = self.runs.get(name)
        bucket = run and {
            "id": name,
            "name": name,
            "displayName": run.fields["displayName"],
            "summaryMetrics": json.dumps(run.summary),
            "config": run.fields["config"],
            "tags": run.fields["tags"],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
            "historyTail": json.dumps(
                [line for _, line in sorted(run.lines.get("wandb-history.jsonl", {}).items())][-1:]
            ),
            "eventsTail": "[]",
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "1", "name": project, "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def UpsertBucket(self, name, project, **rest):
        new = name not in self.runs
        run = self.runs.setdefault(name, Received())
        run.upserts += 1
        run.fields |= {k: v for k, v in {"project": project, **rest}.items() if v is not None}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.fields.get("displayName"),
            "description": None,
            "config": run.fields["config"],
            "sweepName": None,
            "project": {"id": "1", "name": run.fields["project"], "entity": {"id": "1", "name": ENTITY}},
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", {})),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def OrganizationCoreWeaveOrganizationID(self, **_):
        return {"entity": {"organization": {"coreWeaveOrganizationId": ""}}}

    def CreateRunFiles(self, run, files, **_):
        links = [{"name": name, "uploadUrl": f"{self.url}/put/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": links}}
