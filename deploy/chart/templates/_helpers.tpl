{{- define "concertina.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels that select pods; give (dict "root" $ "component" "node"). Not the name: KubeRay puts its own on Ray's pods. */}}
{{- define "concertina.selector" -}}
app.kubernetes.io/part-of: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "concertina.labels" -}}
{{ include "concertina.selector" . }}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "concertina.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "concertina.redis" -}}
{{- if .Values.redis.enabled }}redis://{{ include "concertina.name" . }}-redis:{{ .Values.redis.port }}/0{{ else }}{{ required "redis.url is needed where redis.enabled is false" .Values.redis.url }}{{ end }}
{{- end }}

{{/* What every pod of ours runs as: nobody special, no privileges, no token. */}}
{{- define "concertina.podSecurity" -}}
serviceAccountName: {{ include "concertina.name" . }}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "concertina.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* What concertina up sets as well; services/worker/private_ray.py says why. */}}
{{- define "concertina.rayEnv" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_SERVE_GRPC_MAX_MESSAGE_SIZE, value: "16777216"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "1"}
- {name: RAY_SERVE_PROXY_USE_GRPC, value: "1"}
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, value: "0"}
- {name: RAY_SERVE_METRICS_EXPORT_INTERVAL_MS, value: "1000"}
- {name: GRPC_EXPERIMENTS, value: "-event_engine_client,-event_engine_listener"}
- {name: OMP_WAIT_POLICY, value: PASSIVE}
- {name: XDG_CACHE_HOME, value: /cache}
{{- end }}

{{- define "concertina.storeEnv" -}}
{{- with .Values.security }}
{{- if .tokenSecret }}
- {name: CONCERTINA_CLIENT__CREDENTIAL, value: /etc/store/token/token}
{{- end }}
{{- if .tlsSecret }}
- {name: CONCERTINA_CLIENT__TLS_CA, value: /etc/store/ca/ca.crt}
- {name: CONCERTINA_CLIENT__TLS_NAME, value: {{ required "security.tlsName is needed with security.tlsSecret: the name in the nodes' certificate" .tlsName | quote }}}
{{- end }}
{{- if .clientTlsSecret }}
- {name: CONCERTINA_CLIENT__TLS_CERT, value: /etc/store/tls/tls.crt}
- {name: CONCERTINA_CLIENT__TLS_KEY, value: /etc/store/tls/tls.key}
{{- end }}
{{- end }}
{{- end }}

{{- define "concertina.tenantsVolume" -}}
- name: tenants
  secret: {secretName: {{ .Values.worker.tenantsSecret }}, items: [{key: tenants.json, path: tenants.json}]}
{{- end }}
