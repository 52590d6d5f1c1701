// Each object of a JSON list on stdin against its project's own model: prints a line for each that is refused.
// Kinds are looked up by apiVersion; what npm has no model of is left to the schemas of deploy/check.
import { readFileSync } from "node:fs";

const PACKAGES = {
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
  "keda.sh": "@kubernetes-models/keda",
  "gateway.networking.k8s.io": "@kubernetes-models/gateway-api",
};

let asked = 0;
for (const item of JSON.parse(readFileSync(0, "utf8"))) {
  const [group, version] = item.apiVersion.split("/");
  if (!(group in PACKAGES)) continue;
  const models = await import(`${PACKAGES[group]}/${group}/${version}/${item.kind}`);
  asked += 1;
  try {
    new models[item.kind](item).validate();
  } catch (error) {
    console.log(`${item.kind}/${item.metadata.name}: ${error.message}`);
  }
}
console.log(`asked ${asked}`);
